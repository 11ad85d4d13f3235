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
Compare responses, of one or more checkpoints, with those of a baseline to the same prompts: how often does each win?

FILE and --baseline have rows {"prompt", "response"}; several responses to a prompt are compared in their order. Without
--baseline, a row of FILE has both: {"input", "actor_num0_response", "actor_latest_response"}; the last one is judged.

A model behind any OpenAI-compatible endpoint is asked about each pair twice, with the responses in both orders. A pair
is won, or lost, if both verdicts agree; otherwise it is a tie. The expected cost is shown before the first question and
has to be confirmed. Questions that fail are asked again, after a wait that doubles; one that keeps failing ends the
command. Endpoints without JSON schemas need --response-format json_object or none. The API key is read from an
environment variable, and written nowhere.

With --gold a function of yours decides, like a run's `gold_reward`: it takes a Sample (prompt, response,
finished, and the row's "fields" as generate writes them, or its other fields; no token ids) and gives a number; the
higher wins. A text counts as finished if no row says how it ended, as in `nemo-eppo evaluate`. No endpoint is asked.

Every answer or gold reward is saved at once in answers.jsonl of the output directory: the same command, or one with
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
    endpoint.add_argument("--yes", action="store_true", help="start without confirmation of the cost")
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
        raise ConfigError(
            "there is no terminal to confirm this cost on; --yes confirms it beforehand. Nothing was asked"
        )
    if input("Ask? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("not confirmed; nothing was asked")
