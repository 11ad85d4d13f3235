"""What the commands that run a model share: their arguments for prompts, precision and layout, a process per rank."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from nemo_eppo.config import ConfigT, load_config
from nemo_eppo.entry.torchrun import end_with_torchrun
from nemo_eppo.evaluation.options_cli import add_options, chosen
from nemo_eppo.settings.evaluation import ModelRunConfig


def add_model_arguments(parser: argparse.ArgumentParser, schema: type[ModelRunConfig]) -> None:
    """Add --chat-template, --precision, --batch-size, --tp and --pp, whose help says how to get replicas, too."""
    add_options(parser, schema, chat_template=None, precision=None, batch_size="N")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="number of tensor-parallel processes")
    parser.add_argument(
        "--pp",
        type=int,
        default=1,
        metavar="N",
        help="number of pipeline-parallel processes; replicas of the model, which share the rows, are what further "
        "processes under `torchrun --nproc_per_node N -m nemo_eppo.cli COMMAND ...` become",
    )


def model_config(arguments: argparse.Namespace, schema: type[ConfigT], **others: Any) -> ConfigT:
    """Check the options of a command that runs a model, with `others`, as its settings; before all that takes time.

    A process that torchrun started ends with it from now on.
    """
    end_with_torchrun()
    layout = {"tensor_model_parallel_size": arguments.tp, "pipeline_model_parallel_size": arguments.pp}
    return load_config(schema, chosen(arguments, schema) | {"parallel": layout} | others)


def run_on_ranks(arguments: argparse.Namespace, run: Callable[[], None]) -> bool:
    """Run a checked job, with --tp or --pp in that many processes: each starts the same command once more.

    Returns:
        whether this is the process that tells the user what was done.
    """
    from nemo_eppo.megatron import runtime

    ranks = arguments.tp * arguments.pp
    if ranks > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torchrun = ["-m", "nemo_eppo.entry.torchrun", "--nproc_per_node", str(ranks)]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "nemo_eppo.cli", *arguments.command_line])
    try:
        run()
    finally:
        runtime.shutdown()
    return os.environ.get("RANK", "0") == "0"
