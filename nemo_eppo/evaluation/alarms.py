"""`nemo-eppo detect` on several runs: right alarms of each sign, where the gold reward falls, and false ones."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.run_detection import NothingHackedError, RunDetection
from nemo_eppo.settings.evaluation import DetectionConfig


@dataclass(frozen=True)
class SignAlarms:
    """The alarms of one sign in the runs that recorded it, and its AUROC of finding hacked responses."""

    auroc: list[float]
    """Of each run, over all its responses."""
    auroc_within: list[float]
    """Among responses of one step, of each run that has an estimate."""
    fell: int
    """Number of runs whose gold reward fell beyond noise: there, an alarm is right."""
    raised: int
    """Number of these runs with an alarm."""
    leads: list[int]
    """Steps from these alarms to the peak of the gold reward, where there is a lead (see `Alarm`)."""
    others: int
    """Number of runs whose gold reward did not fall: there, an alarm is false."""
    false: int
    """Number of these runs with an alarm."""


class Alarms:
    """The alarms of all signs in several runs, each with its name.

    A run without hacked responses, or without normal ones, is left out: signs have nothing to tell apart there.

    Raises:
        ConfigError: a run cannot be read (see `RunDetection`), or all are left out.
    """

    def __init__(self, configs: Mapping[str, DetectionConfig]) -> None:
        self.runs: dict[str, RunDetection] = {}
        self.left_out: dict[str, str] = {}
        """The reason, by the run's name."""
        for name, config in configs.items():
            try:
                self.runs[name] = RunDetection(config)
            except NothingHackedError as error:
                self.left_out[name] = str(error)
        if not self.runs:
            raise ConfigError(f"all {len(configs)} runs are left out; the first: {next(iter(self.left_out.values()))}")

    @property
    def fell(self) -> int:
        """Number of runs whose gold reward fell beyond noise."""
        return sum(run.fell for run in self.runs.values())

    @cached_property
    def signs(self) -> dict[str, SignAlarms]:
        """The alarms of each sign, from the highest median AUROC down."""
        names = dict.fromkeys(sign for run in self.runs.values() for sign in run.alarms)
        signs = {sign: self._sign_alarms(sign) for sign in names}
        return dict(sorted(signs.items(), key=lambda item: -statistics.median(item[1].auroc)))

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers, those of the single runs too, for a JSON file."""
        return {
            "runs": {name: run.as_dict() for name, run in self.runs.items()},
            "left_out": self.left_out,
            "signs": {sign: asdict(alarms) for sign, alarms in self.signs.items()},
        }

    def _sign_alarms(self, sign: str) -> SignAlarms:
        runs = [run for run in self.runs.values() if sign in run.alarms]
        alarms = {fell: [run.alarms[sign] for run in runs if run.fell == fell] for fell in (True, False)}
        within = [run.alarms[sign].auroc_within for run in runs]
        return SignAlarms(
            auroc=[detector.auroc.value for run in runs for detector in run.detectors if detector.sign == sign],
            auroc_within=[estimate.value for estimate in within if estimate is not None],
            fell=len(alarms[True]),
            raised=sum(alarm.step is not None for alarm in alarms[True]),
            leads=[alarm.lead for alarm in alarms[True] if alarm.lead is not None],
            others=len(alarms[False]),
            false=sum(alarm.step is not None for alarm in alarms[False]),
        )
