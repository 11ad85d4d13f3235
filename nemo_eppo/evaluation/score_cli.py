"""The arguments of `nemo-eppo score`."""

import argparse

from nemo_eppo.evaluation.arguments import add_model_arguments, add_options, model_config, run_on_ranks
from nemo_eppo.settings.evaluation import ScoreConfig


def add_score(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "score",
        help="compute log-probability and energy loss of given responses under a model",
        description="""\
Compute log-probability and energy loss of given responses under a Hugging Face directory or a checkpoint.

For each row one {"logprob", "num_tokens", "energy_loss"} is written, in order: the log-probability summed over the
response's tokens (at temperature 1, over the whole vocabulary), their number, and their mean energy loss.

Which tokens count: of rows with "prompt_ids" and "response_ids", as in rollouts/step_*.jsonl of a run, exactly these;
they end with the end-of-sequence token (EOS) where the response finished. Of other rows "prompt" and "response" are
tokenised separately, as in training, with BOS before the prompt if the tokenizer adds it; EOS follows and counts where
the row has "finished": true or "finish_reason": "stop". The same command resumes an interrupted run.""",
        epilog="""\
example:
  nemo-eppo score --model models/Qwen3-8B --data answers.jsonl --output scores.jsonl --tp 2
  nemo-eppo score --model models/sft --data runs/eppo/actor/rollouts/step_000100.jsonl --output scores.jsonl""",
    )
    add_options(parser, ScoreConfig, model="DIR", data="FILE", output="FILE", preset=None, layer="N", sweep=None)
    add_model_arguments(parser, ScoreConfig)
    parser.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.score import Scoring

    job = Scoring(model_config(arguments, ScoreConfig))
    if run_on_ranks(arguments, job.run):
        print(f"wrote {arguments.output}")
