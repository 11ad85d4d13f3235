"""The arguments of `nemo-eppo score`."""

import argparse
from pathlib import Path

from nemo_eppo.config import load_config
from nemo_eppo.evaluation.ranks_cli import add_model_arguments, model_settings, run_on_ranks


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
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory or checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="rows to read, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="new .jsonl file, or the one of an interrupted run"
    )
    parser.add_argument(
        "--preset",
        default="paper",
        help="energies to read: paper (the layer's residual stream), mlp_block, down_proj, mlp_linears or "
        "mlp_linears_out (the last two sum over gate, up and down projection)",
    )
    parser.add_argument("--layer", type=int, default=-1, metavar="N", help="decoder layer to read; -1 is the last")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help='also write "energies", of every layer under every preset, which energy-report compares',
    )
    add_model_arguments(parser)
    parser.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> None:
    from nemo_eppo.entry.torchrun import end_with_torchrun
    from nemo_eppo.evaluation.score import ScoreConfig, Scoring

    end_with_torchrun()
    names = ("model", "data", "output", "preset", "layer", "sweep", "chat_template")
    job = Scoring(load_config(ScoreConfig, model_settings(arguments, *names)))
    if run_on_ranks(arguments, job.run):
        print(f"wrote {arguments.output}")
