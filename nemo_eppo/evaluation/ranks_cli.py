"""What the commands that run a model share: their arguments for prompts, precision and layout, a process per rank."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser, *, per_pass: str = "rows per forward pass") -> None:
    """Add --chat-template, --precision, --batch-size, --tp and --pp."""
    parser.add_argument(
        "--chat-template", action="store_true", help="make texts the user's turn of the tokenizer's chat template"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="precision of the model")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help=per_pass)
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="number of tensor-parallel processes")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="number of pipeline-parallel processes")


def model_settings(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return these arguments, with precision, batch size and layout, as settings of a command that runs a model."""
    settings = {name: getattr(arguments, name) for name in (*names, "precision", "batch_size")}
    layout = {"tensor_model_parallel_size": arguments.tp, "pipeline_model_parallel_size": arguments.pp}
    return settings | {"parallel": layout}


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
