"""The arguments of `nemo-eppo evaluate`."""

import argparse
from functools import partial

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.arguments import add_model_arguments, add_options, model_config, run_on_ranks
from nemo_eppo.evaluation.generate_cli import add_sampling_arguments, sampling
from nemo_eppo.settings.evaluation import EvaluateConfig


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a policy's answers: proxy and gold rewards, best-of-n, energy loss, KL, length",
        description="""\
Answer prompts with a policy, or take finished responses, and measure them. A text counts as finished in a row that has
neither "finished" nor "finish_reason".

--proxy (any number) and --gold take a reward checkpoint, the address grpc://HOST:PORT of a running reward server, or a
function module:function, as in training: a reward model's scores are standardised by its validation mean and std. With
--model, log-probabilities and energy losses of the responses are computed; with --reference, KL divergence and the
reference's energy losses too. All models need the same tokenizer; only one is in memory at a time.

With several answers to each prompt, best-of-n curves show the proxy and gold rewards of answers chosen by the proxy,
over the KL divergence log n - (n-1)/n, with Gao's fits and their bands. With several proxies, their mean, minimum (wco)
and uncertainty-weighted mean (uwo) choose as well.

Written into --output: gold_eval_with_response_ids.json (a list of {"instruction", "answers", "answers_ids",
"proxy_scores", "gold_scores"}), samples.jsonl (all measures of each response), summary.json, report.html,
evaluation.png. The same command resumes an interrupted evaluation, row by row, from the directory's parts/.""",
        epilog="""\
example:
  nemo-eppo evaluate --model models/aligned --reference models/sft --prompts prompts.jsonl --samples-per-prompt 16 \\
      --proxy models/rm --gold models/gold_rm --output evaluation
  nemo-eppo evaluate --responses answers.jsonl --proxy models/rm_1 --proxy models/rm_2 --gold my_rewards:quality \\
      --output evaluation""",
    )
    add_options(parser, EvaluateConfig, model="DIR", prompts="FILE", responses="FILE", output="DIR", reference="DIR")
    parser.add_argument(
        "--proxy", dest="proxies", action="append", default=[], metavar="REWARD", help="proxy reward; may be repeated"
    )
    add_options(parser, EvaluateConfig, gold="REWARD", certificates="DIR")
    add_sampling_arguments(parser, EvaluateConfig)
    add_model_arguments(parser, EvaluateConfig)
    parser.set_defaults(run=partial(_evaluate, parser))


def _evaluate(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.evaluate import Evaluation

    if arguments.responses is not None:
        for name in ("samples_per_prompt", *sampling(arguments), "stop"):
            if name in arguments and getattr(arguments, name) != parser.get_default(name):
                raise ConfigError(f"--{name.replace('_', '-')}: says how --prompts are answered, not --responses")
    job = Evaluation(model_config(arguments, EvaluateConfig, sampling=sampling(arguments)))
    if run_on_ranks(arguments, job.run):
        print(f"wrote {arguments.output / 'report.html'}")
