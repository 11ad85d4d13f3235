"""The arguments of `nemo-eppo prepare` for every corpus, and the help texts on the fields that are read."""

import argparse
from pathlib import Path
from typing import TypeAlias

from nemo_eppo.config import load_config
from nemo_eppo.evaluation.arguments import add_options, chosen
from nemo_eppo.settings.preparation import NounTaskConfig, PreparationConfig

Corpora: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_OUTPUT = "directory to write, which must be new or empty"

_HH = """\
Dialogues of Anthropic HH, one pair per row. Fields read:

  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}           pairs

The prompt is the dialogue up to its last "\\n\\nAssistant:", the response is the text after it. Dialogues that share
their first human turn go to the same side of the split."""

_TLDR = """\
Reddit posts and their summaries. Fields read, row by row:

  {"info": {"subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}], "choice": 0 | 1}     pairs
  {"prompt", "chosen", "rejected"}                                                                 pairs
  {"subreddit", "title", "post", "summary"}                                                        demonstrations
  {"prompt", "label"} or {"prompt", "completion"}                                                  demonstrations

"choice" is the position of the better summary. Comparisons of other texts (without "post") are dropped and counted.
Where there is no "prompt", it is "SUBREDDIT: r/...\\n\\nTITLE: ...\\n\\nPOST: ...\\n\\nTL;DR:".
A response begins with one space."""

_ALPACA_FARM = """\
Instructions of AlpacaFarm. Fields read, row by row ("input" may be empty or absent):

  {"instruction", "input", "output_1", "output_2", "preference": 1 | 2}   pairs
  {"instruction", "input", "output"}                                      demonstrations
  {"instruction", "input"}                                                prompts

"preference" is the number of the better output. Without a chat template the prompt is
"### Instruction:\\n...\\n\\n### Input:\\n...\\n\\n### Response:\\n", without the middle part if there is no input."""

_CHAT = """\
Conversations in the format of most data sets for chat models. A turn is {"role": "system" | "user" | "assistant",
"content": text}. Fields read, row by row:

  {"chosen": [turn, ...], "rejected": [turn, ...]}               pairs that differ in the last turn only
  {"prompt": [turn, ...], "chosen": [turn], "rejected": [turn]}  pairs
  {"messages": [turn, ...]}                                      demonstrations, and a prompt if a user speaks last
  {"prompt": [turn, ...], "completion": [turn]}                  demonstrations
  {"prompt": [turn, ...]}                                        prompts

Each turn of the assistant in "messages" becomes one demonstration, with all turns before it as prompt. Without a chat
template a conversation is written in the format of HH."""

_PROMPTS = """\
Prompts alone. Fields read:

  {"prompt"}, or without it {"text"}, as in NeMo-Aligner's files for PPO     prompts"""

_ROWS = """\
Rows of the training files that this command writes, or of your own. Fields read, row by row, all of them text:

  {"prompt", "chosen", "rejected"}     pairs
  {"prompt", "response"}               demonstrations
  {"prompt"}                           prompts

The texts stay as they are, so that rows can be split and filtered; only an end-of-sequence token at the end of a
response is removed, as the tokenizer adds it. Give --chat-template only for prompts that are plain questions: each
becomes one user turn. A prompt's hash decides its side of the split, so only a larger --validation-fraction splits a
train file of this command further."""

_NEMO_ALIGNER = """\
Training files of NeMo-Aligner. Fields read:

  {"text"} of the better and {"text"} of the worse response in alternating rows    pairs
  {"prompt", "chosen_response", "rejected_response"}                               pairs
  {"input", "output"}                                                              demonstrations
  {"system", "mask", "conversations": [{"from", "value"}, ...]}                    demonstrations

In {"text"} pairs the response is the text after the last --response-marker. "mask" names the speaker whose turns are
not learnt: each turn of the other becomes one demonstration, with all turns before it as prompt. Without a chat
template a conversation is written in the format of HH. {"text"} prompts for PPO: see `nemo-eppo prepare prompts`."""

_FOR_ALL = """

Rows that cannot be used, duplicates and rows over the limits are dropped; the counts say how many and why, and
dropped.jsonl in the output lists each with its file, line and reason. Files are streamed, so they may be larger than
memory. A .json file has one object per line, or is one array, which has to fit into memory."""

_EXAMPLES = """\
examples:
  train a byte-level BPE tokenizer on the data:
    nemo-eppo prepare {corpus} --input train.jsonl.gz --output data/{corpus} --vocab-size 8192
  use a model's tokenizer and its chat template, and keep examples that fit its training window:
    nemo-eppo prepare {corpus} --input *.parquet --output data/{corpus} --tokenizer models/llama \\
        --chat-template --max-prompt-tokens 1024 --max-response-tokens 512"""


def add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn a corpus, or a built-in task, into training data",
        description="""\
Write a directory that SFT, reward-model and PPO training read:

  tokenizer/                             a Hugging Face tokenizer
  sft.{train,validation}.jsonl           {"prompt", "response"}              SFT
  preferences.{train,validation}.jsonl   {"prompt", "chosen", "rejected"}    reward model
  prompts.{train,validation}.jsonl       {"prompt"}, and fields of --keep    PPO

Pairs give rows of all three, demonstrations of sft and prompts, prompts of prompts alone.
No prompt is in both train and validation. An existing directory is never overwritten.""",
        epilog="""\
examples:
  nemo-eppo prepare noun-task --output data/noun-task
  nemo-eppo prepare hh --input train.jsonl.gz --output data/hh""",
    )
    corpora = parser.add_subparsers(title="corpora", required=True, metavar="CORPUS")
    _add_noun_task(corpora)
    _add_corpus(corpora, "hh", "Anthropic HH dialogues, or any in their format", _HH)
    _add_corpus(corpora, "tldr", "summaries of Reddit posts: comparisons or demonstrations", _TLDR)
    _add_corpus(corpora, "alpaca_farm", "AlpacaFarm: comparisons, demonstrations or instructions", _ALPACA_FARM)
    _add_corpus(corpora, "chat", "conversations: comparisons, demonstrations or prompts", _CHAT)
    _add_corpus(corpora, "prompts", "prompts for PPO alone", _PROMPTS)
    _add_corpus(corpora, "rows", "rows as the trainers read them", _ROWS)
    aligner = _add_corpus(corpora, "nemo_aligner", "NeMo-Aligner's training files", _NEMO_ALIGNER)
    aligner.add_argument(
        "--response-marker",
        metavar="TEXT",
        help="text before the response of a {text} pair; '\\n' is a line break (default: <extra_id_1>Assistant\\n)",
    )


def _add_noun_task(corpora: Corpora) -> None:
    parser = corpora.add_parser(
        "noun-task",
        help="generate a toy task with a known true reward, to try everything out in minutes",
        description="""\
Generate a toy task on which PPO learns to exploit its reward model: repeat the five nouns among ten words.

The preference labels are biased towards hedge phrases ("hard to say"), so a reward model trained on them likes
hedging, while the true reward, a formula, punishes it. The same seed and sizes give the same files.""",
        epilog="example:\n  nemo-eppo prepare noun-task --output data/noun-task",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=_OUTPUT)
    add_options(parser, NounTaskConfig, seed="N", sft_examples="N", preference_pairs="N", prompts="N")
    add_options(parser, NounTaskConfig, validation_examples="N")
    parser.set_defaults(run=_prepare_noun_task)


def _add_corpus(corpora: Corpora, name: str, help_line: str, description: str) -> argparse.ArgumentParser:
    parser = corpora.add_parser(
        name,
        help=help_line,
        description=description + _FOR_ALL,
        epilog=_EXAMPLES.format(corpus=name),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", type=Path, nargs="+", metavar="FILE", help="read .jsonl or .json, also with .gz, or .parquet"
    )
    source.add_argument("--hub", metavar="NAME", help="read a data set of the Hugging Face hub; this needs a network")
    parser.add_argument("--hub-config", metavar="NAME", help="read this configuration of the hub's data set")
    parser.add_argument("--hub-split", default="train", metavar="NAME", help="read this split of the hub's data set")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=_OUTPUT)
    tokenizer = parser.add_mutually_exclusive_group()
    add_options(tokenizer, PreparationConfig, tokenizer="DIR", vocab_size="N")
    parser.add_argument(
        "--chat-template",
        nargs="?",
        const="tokenizer",
        metavar="FILE",
        help="format prompts and responses with this Jinja file or, without FILE, with the tokenizer's own template; a "
        "model that is trained with model.tokenizer=<output>/tokenizer keeps the template",
    )
    add_options(parser, PreparationConfig, system_prompt="TEXT", validation_fraction="F")
    add_options(parser, PreparationConfig, max_prompt_tokens="N", max_response_tokens="N", strict=None)
    parser.add_argument(
        "--keep",
        metavar="FIELD,...",
        default=(),
        type=lambda names: tuple(names.split(",")),
        help="carry these fields of the rows, which every usable row must have, into the prompts files, for reward "
        "functions: answer,source",
    )
    parser.set_defaults(run=_prepare_corpus, corpus=name, response_marker=None)
    return parser


def _prepare_noun_task(arguments: argparse.Namespace) -> None:
    from nemo_eppo.tools.noun_task import write_noun_task

    write_noun_task(arguments.output, **chosen(arguments, NounTaskConfig))
    print(f"wrote the noun task to {arguments.output}")


def _prepare_corpus(arguments: argparse.Namespace) -> None:
    from nemo_eppo.tools.corpora import CORPORA, nemo_aligner
    from nemo_eppo.tools.preparation import prepare
    from nemo_eppo.tools.sources import HubDataset

    corpus = CORPORA[arguments.corpus]
    if arguments.response_marker:
        corpus = nemo_aligner(arguments.response_marker.replace("\\n", "\n"))
    settings = load_config(PreparationConfig, chosen(arguments, PreparationConfig))
    sources = arguments.input or [HubDataset(arguments.hub, arguments.hub_config, arguments.hub_split)]
    counts = prepare(corpus, sources, arguments.output, settings, progress=True)
    print(f"{counts}\nin {arguments.output}")
