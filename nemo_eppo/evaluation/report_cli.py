"""The arguments of `nemo-eppo report`."""

import argparse
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.arguments import add_names, named


def add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="show what a PPO run did, or compare several",
        description="""\
Make one HTML page, which needs no other file, from the run directories of PPO actors.

For one run (report.html): proxy reward, gold reward, KL divergence, energy loss and length over its steps, single
responses before and after training, its reward ledger, the time of each phase, alarms and settings. It needs two
validations.

For several runs (comparison.html): these curves in the same charts, each term of the ledgers, the time of each phase,
alarms, the settings that differ, and the answers of all runs to the same validation prompts side by side. A run may
still be in progress.

Beside the page, a picture (.png) has its main curves, and a .json file their last values and the settings that
differ.""",
        epilog="""\
examples:
  nemo-eppo report runs/eppo/actor
  nemo-eppo report runs/eta=*/actor --output runs/compared""",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory of an actor")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="directory for the page (default, for one run: the run's own)"
    )
    add_names(parser, "RUN")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from nemo_eppo.observability.comparison import compare_runs, summarise_runs
    from nemo_eppo.observability.metrics import FILE_NAME
    from nemo_eppo.observability.report import report_from_run

    runs = named(arguments.runs, arguments.names)
    for run in runs.values():
        for file in (FILE_NAME, "config.yaml"):
            if not (run / file).is_file():
                raise ConfigError(f"{run} is no run directory of a job: it has no {file}")
    if len(runs) > 1 and arguments.output is None:
        raise ConfigError("--output: expected a directory for the comparison of several runs")
    out: Path = arguments.output or arguments.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    try:
        if len(runs) > 1:
            print(f"{compare_runs(runs, out)}wrote {out}/comparison.html")
        else:
            report_from_run(arguments.runs[0], out / "report.html")
            print(f"{summarise_runs(runs, out / 'report')}wrote {out}/report.html")
    except ValueError as error:  # a file is damaged, or lacks measures of a report
        raise ConfigError(str(error)) from None
