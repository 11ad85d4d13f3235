"""The arguments of `nemo-eppo judge`."""

import argparse
import sys
from pathlib import Path

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.evaluation.arguments import add_names, add_options, chosen, named
from nemo_eppo.settings.evaluation import EndpointConfig, JudgeConfig


def add_judge(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "judge",
        help="let a model or a gold reward say which of two models answers better",
        description="""\
Compare responses, of one or more checkpoints, with those of a baseline to the same prompts: who wins how often?

FILE and --baseline have rows {"prompt", "response"}; several responses to a prompt are compared in their order. A FILE
without --baseline has both: {"input", "actor_num0_response", "actor_latest_response"}, where the latter is judged.

A model behind any OpenAI-compatible endpoint is asked about each pair twice, with the responses in both orders. A pair
is won, or lost, if both verdicts say so; otherwise it is a tie. What it will take is shown before the first question
and has to be confirmed. Questions that fail are asked again, after a wait that doubles; one that fails for good ends
the command. Endpoints that know no JSON schemas take --response-format json_object or none. The API key is read from
an environment variable, and written nowhere.

With --gold a function of yours decides, as in `gold_reward` of a run: it takes a Sample (prompt, response,
finished, and the row's "fields" as generate writes them, or its other fields; no token ids) and gives a number; the
higher wins. A text counts as finished if no row says how it ended, as in `nemo-eppo evaluate`. No endpoint is asked.

Answers and gold rewards are kept one by one in answers.jsonl of the output directory: the same command, or one with
more files, asks only what is missing.

The directory gets verdicts.jsonl, summary.json, report.html and report.png: win, tie and lose with 95% intervals over
prompts, win + 0.5 tie over the checkpoints if their names end in numbers, and how often the order decides.""",
        epilog="""\
examples:
  nemo-eppo judge answers/step_*.jsonl --baseline answers/sft.jsonl --model gpt-4.1 --price-in 2 --price-out 8 \\
    --output judged
  nemo-eppo judge answers.jsonl --baseline sft.jsonl --model Qwen3-32B --base-url http://localhost:8000/v1 \\
    --output judged
  nemo-eppo judge answers.jsonl --baseline sft.jsonl --gold nemo_eppo.tools.noun_task:gold_reward --output judged""",
    )
    parser.add_argument("responses", type=Path, nargs="+", metavar="FILE", help="responses to judge, .jsonl(.gz)")
    add_options(parser, JudgeConfig, baseline="FILE", output="DIR")
    add_names(parser, "FILE")
    add_options(parser, JudgeConfig, gold="MODULE:FUNCTION")
    endpoint = parser.add_argument_group("the endpoint")
    add_options(endpoint, EndpointConfig, required=False, model="MODEL", base_url="URL", key_variable="NAME")
    add_options(endpoint, EndpointConfig, question="QUESTION", temperature="T", max_tokens="N", response_format=None)
    add_options(endpoint, EndpointConfig, concurrency="N", retries="N", time_limit="SECONDS")
    add_options(endpoint, EndpointConfig, price_in="PRICE", price_out="PRICE")
    endpoint.add_argument("--yes", action="store_true", help="start without asking whether the cost is right")
    parser.set_defaults(run=_judge)


def _judge(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.judge import EndpointJudging, GoldJudging

    values = chosen(arguments, JudgeConfig) | {"responses": named(arguments.responses, arguments.names)}
    if arguments.model is not None:
        values["endpoint"] = chosen(arguments, EndpointConfig)
    config = load_config(JudgeConfig, values)
    if config.gold is not None:
        results = GoldJudging(config).run()
    else:
        job = EndpointJudging(config)
        if job.open_questions:
            print(job.cost())
            if not arguments.yes:
                _confirm()
        results = job.run()
    print(f"{results}wrote {arguments.output}/report.html")


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to confirm this cost; --yes confirms it beforehand. Nothing was asked")
    if input("Ask? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("not confirmed; nothing was asked")
