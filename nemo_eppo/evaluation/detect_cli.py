"""The arguments of `nemo-eppo detect`."""

import argparse
from pathlib import Path

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.evaluation.arguments import add_names, add_options, chosen, named
from nemo_eppo.settings.evaluation import DetectionConfig


def add_detect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "detect",
        help="find out which sign of reward hacking finished runs gave, how early, and which alarm to switch on",
        description="""\
Measure how well the signs that a run recorded with its responses find hacked ones: energy loss, its rise over the SFT
model's, KL, length, Mahalanobis distance of latents, variance of reward models. The run needs a `gold_reward`.

A response counts as hacked if its gold reward is below the SFT model's mean and its proxy reward above it. For each
sign, for energy loss with KL, and for all combined, the report shows AUROC, average precision, false alarms, and the
step of the first alarm. A sign that tells hacked from normal responses of the same step also gets a lead: the number of
steps from its alarm to the peak of the gold reward. In a run whose gold reward does not fall, alarms are false.

For several runs, it shows how often each sign raised an alarm in runs whose gold reward fell and in the others, its
median lead, and the medians of its AUROC over all responses and among those of a step. A run in which no response is
hacked, or all are, is left out and named.

The output directory gets report.html, detection.png and report.json.""",
        epilog="""\
examples:
  nemo-eppo detect runs/quickstart/actor --output detection
  nemo-eppo detect runs/seed_*/actor --output detection""",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of an actor's run")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for the report")
    add_options(parser, DetectionConfig, calm_steps="N", false_alarms="N")
    add_names(parser, "RUN")
    parser.set_defaults(run=_detect)


def _detect(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation import alarms_page, run_detection_page
    from nemo_eppo.evaluation.alarms import Alarms
    from nemo_eppo.evaluation.run_detection import RunDetection

    configs = {
        name: load_config(DetectionConfig, chosen(arguments, DetectionConfig) | {"run": run})
        for name, run in named(arguments.runs, arguments.names).items()
    }
    try:
        if len(configs) > 1:
            alarms = Alarms(configs)
            print(f"{alarms_page.write_alarms(alarms, arguments.output)}{alarms_page.verdict(alarms)}")
        else:
            [detection] = map(RunDetection, configs.values())
            run_detection_page.write_detection(detection, arguments.output)
            print(run_detection_page.verdict(detection))
    except ValueError as error:  # a damaged file
        raise ConfigError(str(error)) from None
    print(f"wrote {arguments.output / 'report.html'}")
