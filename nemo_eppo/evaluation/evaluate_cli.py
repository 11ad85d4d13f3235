"""The arguments of `nemo-eppo evaluate`."""

import argparse
from functools import partial
from pathlib import Path

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.evaluation.generate_cli import add_sampling_arguments, sampling
from nemo_eppo.evaluation.ranks_cli import add_model_arguments, model_settings, run_on_ranks


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a policy's answers: proxy and gold rewards, best-of-n, energy loss, KL, length",
        description="""\
Answer prompts with a policy, or take finished responses, and measure them. A text counts as finished in a row that has
neither "finished" nor "finish_reason".

--proxy (any number) and --gold take a reward checkpoint, the address grpc://HOST:PORT of a running reward server, or a
function module:function, as in training: a reward model's scores are standardised by its validation mean and std. With
--model, log-probabilities and energy losses of the responses are read; with --reference, KL divergence and the
reference's energy losses too. All models need the same tokenizer; one after the other is in memory.

With several answers to each prompt, best-of-n curves show what choosing by the proxy gains in proxy and gold reward
over the KL divergence log n - (n-1)/n, with Gao's fits and their bands. With several proxies, their mean, minimum (wco)
and uncertainty-weighted mean (uwo) choose as well.

Written into --output: gold_eval_with_response_ids.json (a list of {"instruction", "answers", "answers_ids",
"proxy_scores", "gold_scores"}), samples.jsonl (all that is known of each response), summary.json, report.html,
evaluation.png. The same command resumes an interrupted evaluation, row by row, from parts/ in there.""",
        epilog="""\
example:
  nemo-eppo evaluate --model models/aligned --reference models/sft --prompts prompts.jsonl --samples-per-prompt 16 \\
      --proxy models/rm --gold models/gold_rm --output evaluation
  nemo-eppo evaluate --responses answers.jsonl --proxy models/rm_1 --proxy models/rm_2 --gold my_rewards:quality \\
      --output evaluation""",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="policy: Hugging Face directory or checkpoint")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to answer, as in nemo-eppo generate")
    parser.add_argument("--responses", type=Path, metavar="FILE", help="finished responses, as in nemo-eppo score")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for the results")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="model that the policy is compared with")
    parser.add_argument("--proxy", action="append", metavar="REWARD", help="proxy reward; may be repeated")
    parser.add_argument("--gold", metavar="REWARD", help="gold reward")
    parser.add_argument("--certificates", type=Path, metavar="DIR", help="certificates of the reward servers")
    add_sampling_arguments(parser)
    add_model_arguments(parser, per_pass="responses decoded at once, and rows per forward pass")
    parser.set_defaults(run=partial(_evaluate, parser))


def _evaluate(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    from nemo_eppo.entry.torchrun import end_with_torchrun
    from nemo_eppo.evaluation.evaluate import EvaluateConfig, Evaluation

    if arguments.responses is not None:
        for name in ("samples_per_prompt", *sampling(arguments), "stop"):
            if name in arguments and getattr(arguments, name) != parser.get_default(name):
                raise ConfigError(f"--{name.replace('_', '-')}: says how --prompts are answered, not --responses")
    end_with_torchrun()
    names = ["model", "prompts", "responses", "output", "reference", "gold", "certificates", "samples_per_prompt"]
    settings = model_settings(arguments, *names, "chat_template", "seed")
    settings |= {"proxies": arguments.proxy or (), "sampling": sampling(arguments)}
    job = Evaluation(load_config(EvaluateConfig, settings))
    if run_on_ranks(arguments, job.run):
        print(f"wrote {arguments.output / 'report.html'}")
