"""`nemo-eppo detect` on several runs: how often each sign's alarm comes where the gold reward falls, and where not."""

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
    """What one sign said in the runs that recorded it."""

    auroc: list[float]
    """Of the hacked responses of each run."""
    auroc_within: list[float]
    """The same among responses of one step, of each run that has an estimate."""
    fell: int
    """Number of runs whose gold reward fell beyond noise: an alarm is right there."""
    raised: int
    """In how many of these an alarm came."""
    leads: list[int]
    """Steps from these alarms to the peak of the gold reward, where there is a lead (see `Alarm`)."""
    others: int
    """Number of runs whose gold reward did not fall: an alarm is false there."""
    false: int
    """In how many of these an alarm came."""


class Alarms:
    """What the signs said in several runs, by name.

    A run without hacked responses, or without others, says nothing of signs and is left out.

    Raises:
        ConfigError: a run cannot be read (see `RunDetection`), or all are left out.
    """

    def __init__(self, configs: Mapping[str, DetectionConfig]) -> None:
        self.runs: dict[str, RunDetection] = {}
        self.left_out: dict[str, str] = {}
        """Why, by the run's name."""
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
        """What each sign said, from the highest median AUROC down."""
        names = dict.fromkeys(sign for run in self.runs.values() for sign in run.alarms)
        found = {sign: self._of_sign(sign) for sign in names}
        return dict(sorted(found.items(), key=lambda item: -statistics.median(item[1].auroc)))

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers, those of the single runs too, for a JSON file."""
        return {
            "runs": {name: run.as_dict() for name, run in self.runs.items()},
            "left_out": self.left_out,
            "signs": {sign: asdict(found) for sign, found in self.signs.items()},
        }

    def _of_sign(self, sign: str) -> SignAlarms:
        having = [run for run in self.runs.values() if sign in run.alarms]
        alarms = {fell: [run.alarms[sign] for run in having if run.fell == fell] for fell in (True, False)}
        within = [run.alarms[sign].auroc_within for run in having]
        return SignAlarms(
            auroc=[found.auroc.value for run in having for found in run.detectors if found.sign == sign],
            auroc_within=[estimate.value for estimate in within if estimate is not None],
            fell=len(alarms[True]),
            raised=sum(alarm.step is not None for alarm in alarms[True]),
            leads=[alarm.lead for alarm in alarms[True] if alarm.lead is not None],
            others=len(alarms[False]),
            false=sum(alarm.step is not None for alarm in alarms[False]),
        )
