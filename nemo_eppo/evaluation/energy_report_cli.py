"""The arguments of `nemo-eppo energy-report`."""

import argparse
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.arguments import add_model_arguments, add_options, model_config, run_on_ranks
from nemo_eppo.settings.evaluation import EnergyReportConfig

_SOURCES = {  # source of the energies -> its arguments
    "models": ("before", "after", "data"),
    "scores": ("before_scores", "after_scores"),
    "table": ("table",),
}


def add_energy_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "energy-report",
        help="compare the energy losses of a model before and after RLHF, and find reward hacking by them",
        description="""\
Compare the energy losses of an SFT model's and an RLHF model's responses: means, histograms, a sweep over all layers
and presets. With labels of reward hacking: how well the energy loss, its rise and other signs find the hacked ones.

The energies come from one of:
  --before, --after, --data    two models, which read the responses in one pass each. Rows are {"prompt", "response"}
                               (read by both models, unless --before-data has the SFT model's own responses), or those
                               of the EPPO paper: {"index", "input", "actor_num0_response", "actor_latest_response"}
  --before-scores, --after-scores
                               files that `nemo-eppo score` wrote, with --sweep for the sweep
  --table                      a CSV file: index, label (hacking or normal; no such column with --labels),
                               sft_energy_loss, rlhf_energy_loss

The output directory gets report.html, energies.png, sweep.png, report.json and samples.jsonl. The same command resumes
an interrupted one.""",
        epilog="""\
example:
  nemo-eppo energy-report --before models/sft --after models/ppo --data answers.jsonl --output energies
  nemo-eppo energy-report --table published_energies.csv --output energies""",
    )
    add_options(parser, EnergyReportConfig, required=False, before="DIR", after="DIR", data="FILE", before_data="FILE")
    parser.add_argument("--before-scores", type=Path, metavar="FILE", help="scores of the SFT model")
    parser.add_argument("--after-scores", type=Path, metavar="FILE", help="scores of the RLHF model")
    parser.add_argument("--table", type=Path, metavar="FILE", help="CSV file of both models' energy losses")
    add_options(parser, EnergyReportConfig, labels="FILE", output="DIR", preset=None, layer="N")
    add_model_arguments(parser, EnergyReportConfig)
    parser.set_defaults(run=_energy_report)


def _energy_report(arguments: argparse.Namespace) -> None:
    source = _source(arguments)
    if source == "models":
        _report_on_models(arguments)
        return
    from nemo_eppo.evaluation.energies import read_csv, read_scores, with_labels
    from nemo_eppo.evaluation.energy_page import write_energy_report

    if source == "table":
        energies = read_csv(arguments.table)
        names = (f"SFT of {arguments.table.name}", f"RLHF of {arguments.table.name}")
    else:
        energies = read_scores(arguments.before_scores, arguments.after_scores)
        names = (str(arguments.before_scores), str(arguments.after_scores))
    write_energy_report(with_labels(energies, arguments.labels), arguments.output, names)
    print(f"wrote {arguments.output / 'report.html'}")


def _report_on_models(arguments: argparse.Namespace) -> None:
    from nemo_eppo.evaluation.energy_page import write_energy_report
    from nemo_eppo.evaluation.energy_report import EnergyScoring

    job = EnergyScoring(model_config(arguments, EnergyReportConfig))
    if run_on_ranks(arguments, job.run):
        write_energy_report(job.energies(), arguments.output, (str(arguments.before), str(arguments.after)))
        print(f"wrote {arguments.output / 'report.html'}")


def _source(arguments: argparse.Namespace) -> str:
    """Return the key of _SOURCES whose arguments were given; ConfigError unless it is exactly one, and complete."""

    def options(names: tuple[str, ...]) -> str:
        return ", ".join(f"--{name.replace('_', '-')}" for name in names)

    given = [source for source, names in _SOURCES.items() if any(getattr(arguments, name) for name in names)]
    if len(given) != 1:
        choices = "; or ".join(options(names) for names in _SOURCES.values())
        raise ConfigError(f"expected exactly one of: {choices}")
    (source,) = given
    if missing := tuple(name for name in _SOURCES[source] if getattr(arguments, name) is None):
        raise ConfigError(f"{options(missing)}: required beside {options(_SOURCES[source])}")
    if source != "models" and arguments.before_data:
        raise ConfigError("--before-data: for --before and --after only")
    return source
