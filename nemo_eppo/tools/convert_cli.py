"""The arguments of `nemo-eppo convert`."""

import argparse
from pathlib import Path

from nemo_eppo.tools.aligner_cli import add_aligner_config

_CONVERT = "\n  nemo-eppo convert"
_EXAMPLES = {
    "hf-to-megatron": f"{_CONVERT} hf-to-megatron --input models/Qwen3-8B --output checkpoints/qwen3",
    "megatron-to-hf": f"{_CONVERT} megatron-to-hf --input runs/ppo/checkpoints --output models/aligned",
    "nemo-to-megatron": f"{_CONVERT} nemo-to-megatron --input rm.nemo --tokenizer models/llama --output checkpoints/rm",
}
_ALIGNER = f"{_CONVERT} aligner-config gpt_ppo_actor.yaml --output settings/actor.yaml"


def add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = commands.add_parser(
        "convert",
        help="turn Hugging Face directories and .nemo files into Megatron checkpoints, these into Hugging Face "
        "directories, or NeMo-Aligner's settings into ours",
        description="""\
Convert models with their weights, config and tokenizer. An architecture that is not supported is refused with a list of
those that are. Weights are streamed: a model of any size needs the memory of one of its files and one of its layers.

Training scripts and `nemo-eppo score` read Hugging Face directories directly; nothing has to be converted for them.
The output is complete or does not exist; nothing is ever overwritten.""",
        epilog="".join(["examples:", *_EXAMPLES.values(), _ALIGNER]),
    )
    ways = convert.add_subparsers(title="conversions", required=True, metavar="CONVERSION")
    add_aligner_config(ways)
    hf_to_megatron = ways.add_parser(
        "hf-to-megatron",
        help="convert a Hugging Face directory to a Megatron checkpoint",
        description="""\
Make a checkpoint of a Hugging Face directory: *ForCausalLM, or *ForSequenceClassification with one output.

It loads under any tensor- and pipeline-parallel layout, with the vocabulary padded as that layout needs it.""",
        epilog=f"example:{_EXAMPLES['hf-to-megatron']}",
    )
    _add_conversion_options(hf_to_megatron, "Hugging Face directory to convert")
    hf_to_megatron.set_defaults(run=_hf_to_megatron)
    nemo_to_megatron = ways.add_parser(
        "nemo-to-megatron",
        help="convert a .nemo file of NeMo 1.x or NeMo-Aligner to a Megatron checkpoint",
        description="""\
Make a checkpoint of a language model, reward model or critic of NeMo 1.x or NeMo-Aligner: models like Llama, Mistral
and Qwen2 (RMSNorm, rotary positions, SwiGLU, grouped queries), trained with mcore_gpt and stored as torch_dist.

A setting in model_config.yaml that is not supported is refused by name, as is an array that is missing or left over.
Padding rows that NeMo added to the vocabulary stay in it. A reward model keeps its reward_standardization; without it,
its scores are raw. To convert a training checkpoint, put it as model_weights/ into a directory with its
model_config.yaml. A .nemo file is unpacked beside the output, which takes its size on disk until the end.""",
        epilog=f"example:{_EXAMPLES['nemo-to-megatron']}",
    )
    _add_conversion_options(nemo_to_megatron, ".nemo file, or the directory it unpacks to", metavar="PATH")
    nemo_to_megatron.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face directory with the tokenizer that the model was trained with",
    )
    nemo_to_megatron.set_defaults(run=_nemo_to_megatron)
    for way in (hf_to_megatron, nemo_to_megatron):
        way.add_argument(
            "--precision",
            choices=["fp32", "bf16"],
            help="precision of the checkpoint (default: bf16 if all weights are stored in bf16, else fp32)",
        )
    to_hf = ways.add_parser(
        "megatron-to-hf",
        help="convert a policy to a *ForCausalLM directory, a reward model to a *ForSequenceClassification directory",
        description="""\
Make a Hugging Face directory of the checkpoint of a policy or a reward model, for transformers and inference engines.
LoRA adapters are merged into the weights.

A reward model's output at the last token is the raw score less the head's bias, which transformers cannot store.
config.json holds {"nemo_eppo_reward": {"mean", "std"}}: (output - mean) / std is the standardised score that PPO
uses.""",
        epilog=f"example:{_EXAMPLES['megatron-to-hf']}",
    )
    _add_conversion_options(to_hf, "checkpoint to convert, or a directory whose newest checkpoint is converted")
    to_hf.add_argument(
        "--architecture",
        metavar="NAME",
        help="architecture in config.json (default: that of the model's family), e.g. MistralForCausalLM for a Llama "
        "model",
    )
    to_hf.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        help="precision of the files (default: as the checkpoint); fp16 is for models that were released in it",
    )
    to_hf.set_defaults(run=_megatron_to_hf)


def _add_conversion_options(parser: argparse.ArgumentParser, source: str, metavar: str = "DIR") -> None:
    parser.add_argument("--input", type=Path, required=True, metavar=metavar, help=source)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new directory to write")


def _hf_to_megatron(arguments: argparse.Namespace) -> None:
    from nemo_eppo.tools.convert import HfToMegatron

    HfToMegatron(arguments.input, arguments.output, arguments.precision).run()
    print(f"wrote {arguments.output}")


def _nemo_to_megatron(arguments: argparse.Namespace) -> None:
    from nemo_eppo.tools.convert import NemoToMegatron

    NemoToMegatron(arguments.input, arguments.tokenizer, arguments.output, arguments.precision).run()
    print(f"wrote {arguments.output}")


def _megatron_to_hf(arguments: argparse.Namespace) -> None:
    from nemo_eppo.tools.convert import MegatronToHf

    conversion = MegatronToHf(
        arguments.input, arguments.output, architecture=arguments.architecture, precision=arguments.precision
    )
    conversion.run()
    print(f"wrote {arguments.output}, a {conversion.architecture}")
