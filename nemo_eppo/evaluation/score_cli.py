"""`nemo-eppo score`: its arguments."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_eppo.config import load_config

if TYPE_CHECKING:
    from nemo_eppo.models.layout import ParallelConfig


def add_score(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "score",
        help="log-probability and energy loss of given responses under a model",
        description="""\
Score {"prompt", "response"} rows with a Hugging Face directory or a checkpoint.

One row {"logprob", "num_tokens", "energy_loss"} per row, in order: the sum over the response's tokens of their
log-probability, their number, and the mean energy loss at their positions. Prompt and response are tokenised
separately, without special tokens, and put together. An interrupted run goes on where it stopped.""",
        epilog="""\
example:
  nemo-eppo score --model models/Qwen3-8B --data answers.jsonl --output scores.jsonl --tp 2""",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory or checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=".jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".jsonl, new or of the same command")
    parser.add_argument(
        "--preset",
        default="paper",
        help="which energies are read: paper (the layer's residual stream), mlp_block, down_proj, mlp_linears or "
        "mlp_linears_out (the last two add up those of gate, up and down projection)",
    )
    parser.add_argument("--layer", type=int, default=-1, metavar="N", help="decoder layer, negative from the end")
    parser.add_argument(
        "--chat-template", action="store_true", help="make the prompt the user's turn of the tokenizer's chat template"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of weights and activations")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per forward pass")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel processes to start")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel processes to start")
    parser.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.score import ScoreConfig, Scoring

    names = ("model", "data", "output", "preset", "layer", "chat_template", "precision", "batch_size")
    settings = {name: getattr(arguments, name) for name in names}
    _run_on_ranks(Scoring(load_config(ScoreConfig, settings | {"parallel": _layout(arguments)})), arguments)


def _layout(arguments: argparse.Namespace) -> "ParallelConfig":
    from nemo_eppo.models.layout import ParallelConfig

    sizes = {"tensor_model_parallel_size": arguments.tp, "pipeline_model_parallel_size": arguments.pp}
    return load_config(ParallelConfig, sizes)


class _Job(Protocol):
    def run(self) -> None:
        """On every rank."""


def _run_on_ranks(job: _Job, arguments: argparse.Namespace) -> None:
    """Run a job that was checked, in this process or, by the same command once more, in the processes it needs."""
    ranks = arguments.tp * arguments.pp
    if ranks > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "nemo_eppo.cli", *arguments.command_line])
    from nemo_eppo.megatron import runtime

    try:
        job.run()
    finally:
        runtime.shutdown()
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {arguments.output}")
