"""Which sign would have warned of over-optimisation, by `nemo-eppo detect` on the bench's runs of plain PPO."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.run_detection import DetectionConfig, RunDetection
from nemo_eppo.files import write_json
from nemo_eppo.observability.report_tables import text_table

_HEADER = ["sign", "AUROC", "AUROC in a step", "alarms where gold fell", "lead, median steps", "where it did not"]


def write_alarms(output: Path, runs: Iterable[Path]) -> str:
    """Write alarms.json about the runs that have hacked and other responses; return its table.

    The gold reward of some runs fell beyond noise: there an alarm is right, and leads if it came before the peak. In
    the others an alarm is false.
    """
    found: dict[str, RunDetection] = {}
    for run in runs:
        try:
            found[str(run.relative_to(output))] = RunDetection(DetectionConfig(run=run))
        except ConfigError as error:  # too short, or nothing was hacked
            print(f"no alarms of {run}: {error}", flush=True)
    signs = dict.fromkeys(sign for run in found.values() for sign in run.alarms)
    table = {sign: _of_sign(sign, found) for sign in signs}
    write_json(output / "alarms.json", {"fell": {name: run.fell for name, run in found.items()}, "signs": table})
    fell = sum(run.fell for run in found.values())
    rows = [
        [
            sign,
            _median(of["auroc"]),
            _median(of["auroc_within"]),
            f"{of['raised']}/{fell}",
            _median(of["leads"], 0),
            f"{of['false']}/{len(found) - fell}",
        ]
        for sign, of in table.items()
    ]
    return text_table("Alarms in runs of plain PPO", [_HEADER, *rows], width=140)


def _of_sign(sign: str, runs: dict[str, RunDetection]) -> dict[str, Any]:
    having = [run for run in runs.values() if sign in run.alarms]
    alarms = [(run.fell, run.alarms[sign]) for run in having]
    return {
        "auroc": [one.auroc.value for run in having for one in run.detectors if one.sign == sign],
        "auroc_within": [alarm.auroc_within.value for _, alarm in alarms if alarm.auroc_within is not None],
        "raised": sum(fell and alarm.step is not None for fell, alarm in alarms),
        "leads": [alarm.lead for fell, alarm in alarms if fell and alarm.lead is not None],
        "false": sum(not fell and alarm.step is not None for fell, alarm in alarms),
    }


def _median(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({len(values)})" if values else ""
