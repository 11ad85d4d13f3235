"""The arguments of `nemo-eppo latents`."""

import argparse

from nemo_eppo.evaluation.arguments import add_model_arguments, add_options, model_config, run_on_ranks
from nemo_eppo.settings.evaluation import LatentsConfig


def add_latents(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "latents",
        help="compare the policy's responses with the SFT model's in the latent space of an InfoRM reward model",
        description="""\
Compute the latents of two models' responses in an InfoRM reward model (reward.kind=inform, arXiv 2402.09345), and
measure how far those of the policy are from those of the SFT model: hacked responses are outliers.

--sft and --rlhf are rows as `nemo-eppo score` reads them. A Gaussian is fitted to the SFT latents; each response gets
its Mahalanobis distance and p-value. MOP is the share of the policy's responses whose p-value is below --alpha. CSI,
the cluster separation index, grows with clusters of them that are far from all SFT responses. t-SNE maps both to the
plane, starting from principal components; the same latents give the same map. Latents are in the reward model's
coordinates, in which the SFT responses of its training have mean 0 and covariance I.

The directory gets report.html, latents.png, latents.json and samples.jsonl, a row for each response; parts/ holds the
latents themselves. The same command resumes an interrupted run.""",
        epilog="""\
example:
  nemo-eppo latents --model models/inform --sft sft.jsonl --rlhf aligned.jsonl --output latents""",
    )
    add_options(parser, LatentsConfig, model="DIR", sft="FILE", rlhf="FILE", output="DIR", alpha="P", perplexity="N")
    add_model_arguments(parser, LatentsConfig)
    parser.set_defaults(run=_latents)


def _latents(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.latents import LatentReading

    job = LatentReading(model_config(arguments, LatentsConfig))
    if run_on_ranks(arguments, job.run):
        print(f"{job.write()}wrote {arguments.output}/report.html")
