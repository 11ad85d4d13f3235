"""The `nemo-eppo` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_eppo.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 with one message on stderr for input that cannot work."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ConfigError, OSError) as error:
        print(f"nemo-eppo: error: {error}", file=sys.stderr)
        return 2
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
    _add_prepare(commands)
    return parser


def _add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = commands.add_parser(
        "prepare",
        formatter_class=_HelpFormatter,
        help="turn a corpus, or a built-in task, into training data",
        description="""\
Write a directory that SFT, reward-model and PPO training read:

  tokenizer/                             a Hugging Face tokenizer
  sft.{train,validation}.jsonl           {"prompt", "response"}              SFT
  preferences.{train,validation}.jsonl   {"prompt", "chosen", "rejected"}    reward model
  prompts.{train,validation}.jsonl       {"prompt"}                          PPO

No prompt is in both train and validation. An existing directory is never overwritten.""",
    )
    corpora = prepare.add_subparsers(title="corpora", required=True, metavar="CORPUS")
    _add_noun_task(corpora)
    _add_hh(corpora)


def _add_noun_task(corpora: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = corpora.add_parser(
        "noun-task",
        formatter_class=_HelpFormatter,
        help="generate a toy task with a known true reward, for trying everything out in minutes",
        description="""\
Generate a toy task on which PPO learns to exploit its reward model: repeat the five nouns among ten words.

The preference labels are biased towards hedge phrases ("hard to say"), so a reward model trained on them likes
hedging, while the true reward, a formula, punishes it. The same seed and sizes give the same files.""",
        epilog="example:\n  nemo-eppo prepare noun-task --output data/noun-task",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator")
    parser.add_argument("--sft-examples", type=int, default=20_000, metavar="N", help="demonstrations to train on")
    parser.add_argument("--preference-pairs", type=int, default=16_000, metavar="N", help="labelled pairs to train on")
    parser.add_argument("--prompts", type=int, default=12_000, metavar="N", help="prompts for PPO")
    parser.add_argument(
        "--validation-examples", type=int, default=512, metavar="N", help="examples in each validation file"
    )
    parser.set_defaults(run=_prepare_noun_task)


def _add_hh(corpora: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = corpora.add_parser(
        "hh",
        formatter_class=_HelpFormatter,
        help="Anthropic HH dialogues, or any in their format",
        description="""\
Convert files of {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}, one pair per line.

The prompt is the dialogue up to its last "\\n\\nAssistant:", the response what follows. Pairs whose prompts differ or
whose response is empty are dropped; dropped.jsonl in the output lists each with its file, line and reason.
Files are streamed, so they may be larger than memory.""",
        epilog="""\
examples:
  train a byte-level BPE tokenizer on the data:
    nemo-eppo prepare hh --input train.jsonl.gz --output data/hh --vocab-size 8192
  use a model's tokenizer, and keep what fits its training window:
    nemo-eppo prepare hh --input helpful/*.jsonl.gz harmless/*.jsonl.gz --output data/hh \\
        --tokenizer models/llama --max-prompt-tokens 1024 --max-response-tokens 512""",
    )
    parser.add_argument("--input", type=Path, required=True, nargs="+", metavar="FILE", help=".jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty directory")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", type=Path, metavar="DIR", help="Hugging Face tokenizer directory to use")
    tokenizer.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="size of the tokenizer to train if none is given"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the prompts to hold out; a hash of the prompt decides which",
    )
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="drop pairs with a longer prompt")
    parser.add_argument(
        "--max-response-tokens", type=int, metavar="N", help="drop pairs with a longer response, end token included"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first unusable pair instead of dropping it")
    parser.set_defaults(run=_prepare_hh)


def _prepare_noun_task(arguments: argparse.Namespace) -> None:
    from nemo_eppo.data.noun_task import write_noun_task

    write_noun_task(
        arguments.output,
        seed=arguments.seed,
        sft_examples=arguments.sft_examples,
        preference_pairs=arguments.preference_pairs,
        prompts=arguments.prompts,
        validation_examples=arguments.validation_examples,
    )
    print(f"wrote the noun task to {arguments.output}")


def _prepare_hh(arguments: argparse.Namespace) -> None:
    from nemo_eppo.data.hh import prepare_hh

    counts = prepare_hh(
        arguments.input,
        arguments.output,
        validation_fraction=arguments.validation_fraction,
        tokenizer_dir=arguments.tokenizer,
        bpe_vocab_size=arguments.vocab_size,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_response_tokens=arguments.max_response_tokens,
        strict=arguments.strict,
        progress=True,
    )
    print(f"{counts}\nin {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
