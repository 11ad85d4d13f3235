"""The arguments of `nemo-eppo generate`, and those of sampling, which `evaluate` shares."""

import argparse
from typing import Any

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.evaluation.arguments import add_model_arguments, add_options, chosen, model_config, run_on_ranks
from nemo_eppo.settings.evaluation import GenerateConfig, GeneratorConfig
from nemo_eppo.settings.generation import SamplingParams


def add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a file of prompts with a model, or talk to it in the terminal",
        description="""\
Answer each prompt of a file with a Hugging Face directory or a checkpoint; or, with --interactive, talk to it.

A row of --prompts has "prompt", a text or a chat of {"role", "content"} turns, or "prompt_ids", which are taken as they
are. Texts are tokenised as in training. For each response one row is written: "index" of its prompt, number of the
"sample", "prompt", "response", "prompt_ids", "response_ids", "finish_reason" (stop or length) and "finished"; other
fields of the prompt's row are kept in "fields". `nemo-eppo score` and `evaluate` read these files as they are.

A response depends on the model, its prompt, the number of its sample, --seed and the sampling options, and not on the
other prompts, --batch-size or the layout. --temperature 0 is --greedy. The same command resumes an interrupted run.

--interactive remembers all turns: in the tokenizer's chat template, or, if it has none, as one text with a line
for each turn, which the model continues. /reset starts a new conversation; /quit or Ctrl-D ends.""",
        epilog="""\
example:
  nemo-eppo generate --model models/aligned --prompts prompts.jsonl --output answers.jsonl --samples-per-prompt 4
  nemo-eppo generate --model models/Qwen3-8B --prompts chats.jsonl --output answers.jsonl --greedy --tp 2
  nemo-eppo generate --model models/aligned --interactive --temperature 0.7""",
    )
    add_options(parser, GenerateConfig, model="DIR")
    add_options(parser, GenerateConfig, required=False, prompts="FILE", output="FILE")
    parser.add_argument("--interactive", action="store_true", help="talk to the model instead of answering a file")
    add_sampling_arguments(parser, GenerateConfig)
    add_model_arguments(parser, GenerateConfig)
    parser.set_defaults(run=_generate)


def add_sampling_arguments(parser: argparse.ArgumentParser, schema: type[Config]) -> None:
    """Add the options of sampling."""
    add_options(parser, schema, samples_per_prompt="N", seed="N")
    add_options(parser, SamplingParams, required=False, max_new_tokens="N", min_new_tokens="N", temperature="T")
    add_options(parser, SamplingParams, top_k="K", top_p="P", greedy=None, repetition_penalty="X")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="text that ends a response; may be repeated")
    parser.set_defaults(max_new_tokens=256)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling options as settings of `SamplingParams`; temperature 0 means greedy."""
    options = chosen(arguments, SamplingParams) | {"stop_strings": arguments.stop or ()}
    return options | {"greedy": True, "temperature": 1.0} if arguments.temperature == 0 else options


def _generate(arguments: argparse.Namespace) -> None:
    files = (arguments.prompts, arguments.output)
    is_batch = files != (None, None) or arguments.samples_per_prompt != 1 or arguments.chat_template
    if arguments.interactive and is_batch:
        raise ConfigError("--interactive takes no --prompts, --output, --samples-per-prompt and --chat-template")
    if not arguments.interactive and None in files:
        raise ConfigError("--prompts and --output are required, or --interactive")
    if arguments.interactive:
        _talk(arguments)
        return
    from nemo_eppo.evaluation.generate import Generating

    job = Generating(model_config(arguments, GenerateConfig, sampling=sampling(arguments)))
    if run_on_ranks(arguments, job.run):
        print(f"wrote {arguments.output}")


def _talk(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.conversation import Conversation, talk

    conversation = Conversation(model_config(arguments, GeneratorConfig, sampling=sampling(arguments)))
    run_on_ranks(arguments, lambda: talk(conversation))
