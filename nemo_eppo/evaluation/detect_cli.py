"""The arguments of `nemo-eppo detect`."""

import argparse
from pathlib import Path

from nemo_eppo.config import load_config


def add_detect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "detect",
        help="find out which sign of reward hacking a finished run gave, how early, and which alarm to switch on",
        description="""\
Compare the signs that a run recorded of its responses (energy loss, its rise over the SFT model's, KL, length,
Mahalanobis distance of latents, variance of reward models; whichever it has) with what its gold reward says.

A response counts as hacked if its gold reward is below the SFT model's mean and its proxy reward above it. For each
sign, and for all combined: AUROC and average precision, false alarms, and when an alarm would have come, compared with
the step at which the gold reward was highest, for signs that tell hacked from normal responses of the same step. In a
run whose gold reward does not fall, alarms are false. The run needs a `gold_reward`.

The output directory gets report.html, detection.png and report.json.""",
        epilog="""\
example:
  nemo-eppo detect runs/quickstart/actor --output detection""",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="directory of the actor's run")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for the report")
    parser.add_argument(
        "--calm-steps", type=int, default=10, metavar="N", help="first steps, whose responses set the thresholds"
    )
    parser.add_argument(
        "--false-alarms",
        type=float,
        default=10.0,
        metavar="N",
        help="of 1,000 responses of these steps, how many may reach a threshold",
    )
    parser.set_defaults(run=_detect)


def _detect(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.run_detection import DetectionConfig, RunDetection
    from nemo_eppo.evaluation.run_detection_page import verdict, write_detection

    values = {"run": arguments.directory}
    values |= {name: getattr(arguments, name) for name in ("calm_steps", "false_alarms")}
    detection = RunDetection(load_config(DetectionConfig, values))
    write_detection(detection, arguments.output)
    print(f"{verdict(detection)}\nwrote {arguments.output / 'report.html'}")
