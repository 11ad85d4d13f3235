"""The `nemo-eppo` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_eppo.aligner_cli import add_aligner_config
from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.data.prepare_cli import add_prepare
from nemo_eppo.doctor.doctor_cli import add_doctor
from nemo_eppo.launch.launch_cli import add_launch

if TYPE_CHECKING:
    from nemo_eppo.megatron.runtime import ParallelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 130 after Ctrl-C, or 2 with one message on stderr for bad input."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("nemo_eppo").setLevel(logging.INFO)  # of others only warnings
    arguments = _parser().parse_args(argv)
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments.run(arguments)
    except (ConfigError, OSError) as error:
        print(f"nemo-eppo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nemo-eppo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions and shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shows_default = action.default not in (None, False)
        return super()._get_help_string(action) if shows_default else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-eppo",
        formatter_class=_HelpFormatter,
        description="PPO at Megatron scale with an energy-loss penalty: everything around the training jobs.",
        epilog="Start with:  nemo-eppo prepare --help",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_prepare(commands, _HelpFormatter)
    _add_convert(commands)
    _add_score(commands)
    add_launch(commands, _HelpFormatter)
    add_doctor(commands, _HelpFormatter)
    return parser


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = commands.add_parser(
        "convert",
        formatter_class=_HelpFormatter,
        help="Hugging Face directories to Megatron checkpoints and back; settings of NeMo-Aligner",
        description="""\
Convert Llama, Mistral, Qwen2 and Qwen3 models, weights bit by bit, with config and tokenizer. Weights are streamed: a
model needs the memory of one of its files and one of its layers, whatever its size.

Training scripts and `nemo-eppo score` read Hugging Face directories directly; nothing has to be converted for them.
The output is complete or does not exist; nothing is ever overwritten.""",
        epilog="""\
examples:
  nemo-eppo convert hf-to-megatron --input models/Qwen3-8B --output checkpoints/qwen3
  nemo-eppo convert megatron-to-hf --input runs/ppo/checkpoints --output models/aligned
  nemo-eppo convert reward-to-hf --input runs/rm/checkpoints --output models/reward
  nemo-eppo convert aligner-config gpt_ppo_actor.yaml --output settings/actor.yaml""",
    )
    ways = convert.add_subparsers(title="conversions", required=True, metavar="CONVERSION")
    add_aligner_config(ways, _HelpFormatter)
    hf_to_megatron = ways.add_parser(
        "hf-to-megatron",
        formatter_class=_HelpFormatter,
        help="config.json, tokenizer and safetensors become a checkpoint",
        description="""\
Make a checkpoint of a Hugging Face directory: *ForCausalLM, or *ForSequenceClassification with one output.

It loads under any tensor- and pipeline-parallel layout, with the vocabulary padded as that layout needs it. Other
architectures are handed to Megatron-Bridge where that is installed; its checkpoints are for Megatron-LM and NeMo.""",
    )
    _add_conversion_options(hf_to_megatron, "Hugging Face directory")
    hf_to_megatron.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="of the checkpoint (default: bf16 if all weights are stored in bf16, else fp32, which holds all exactly)",
    )
    hf_to_megatron.set_defaults(run=_hf_to_megatron)
    for name, head, what, description in (
        (
            "megatron-to-hf",
            "lm",
            "a policy becomes a *ForCausalLM directory",
            "Make a Hugging Face directory of a policy's checkpoint, for transformers and inference engines.\n\n"
            "LoRA adapters are merged into the weights.",
        ),
        (
            "reward-to-hf",
            "scalar",
            "a reward model becomes a *ForSequenceClassification directory",
            """\
Make a sequence-classification directory of a reward model's checkpoint.

Its output at the last token is the raw score, less the head's bias, which transformers has no place for. config.json
holds {"nemo_eppo_reward": {"mean", "std"}}: (output - mean) / std is the standardised score that PPO uses.""",
        ),
    ):
        parser = ways.add_parser(name, formatter_class=_HelpFormatter, help=what, description=description)
        _add_conversion_options(parser, "checkpoint, or a directory of checkpoints, whose newest is taken")
        suffix = "ForCausalLM" if head == "lm" else "ForSequenceClassification"
        parser.add_argument(
            "--architecture",
            metavar="NAME",
            help=f"of config.json (default: Llama{suffix}, or Qwen2 or Qwen3 if the model has their biases or norms); "
            f"name Mistral{suffix} if that is meant",
        )
        parser.add_argument(
            "--precision",
            choices=["fp32", "bf16", "fp16"],
            help="of the files (default: that of the checkpoint); fp16 is for models that came in it",
        )
        parser.add_argument(
            "--max-shard-gb", type=float, default=4.0, metavar="GB", help="largest file, held in memory while it fills"
        )
        parser.set_defaults(run=_megatron_to_hf, head=head)


def _add_conversion_options(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help=source)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new directory")


def _add_score(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "score",
        formatter_class=_HelpFormatter,
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


def _hf_to_megatron(arguments: argparse.Namespace) -> None:
    from nemo_eppo.conversion.bridge import import_with_bridge
    from nemo_eppo.conversion.convert import HfToMegatron
    from nemo_eppo.conversion.hf_weights import UnsupportedArchitecture

    try:
        HfToMegatron(arguments.input, arguments.output, arguments.precision).run()
    except UnsupportedArchitecture as reason:
        import_with_bridge(arguments.input, arguments.output, reason)
    print(f"wrote {arguments.output}")


def _megatron_to_hf(arguments: argparse.Namespace) -> None:
    from nemo_eppo.conversion.convert import MegatronToHf

    if not 0 < arguments.max_shard_gb < math.inf:
        raise ConfigError(f"--max-shard-gb {arguments.max_shard_gb}: expected more than 0")
    MegatronToHf(
        arguments.input,
        arguments.output,
        arguments.head,
        architecture=arguments.architecture,
        precision=arguments.precision,
        max_shard_bytes=int(arguments.max_shard_gb * 2**30),
    ).run()
    print(f"wrote {arguments.output}")


def _score(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.score import ScoreConfig, Scoring

    names = ("model", "data", "output", "preset", "layer", "chat_template", "precision", "batch_size")
    settings = {name: getattr(arguments, name) for name in names}
    _run_on_ranks(Scoring(load_config(ScoreConfig, settings | {"parallel": _layout(arguments)})), arguments)


def _layout(arguments: argparse.Namespace) -> "ParallelConfig":
    from nemo_eppo.megatron.runtime import ParallelConfig

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


if __name__ == "__main__":
    sys.exit(main())
