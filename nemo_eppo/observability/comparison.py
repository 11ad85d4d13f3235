"""Compares runs of the actor: one HTML page with their curves in the same charts, a table, comparison.json.

Everything is read from their run directories: metrics.jsonl and config.yaml.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_eppo.files import write_atomically
from nemo_eppo.observability.charts import COLORS, Series, line_chart
from nemo_eppo.observability.metrics import FILE_NAME, read_metrics
from nemo_eppo.observability.report_page import figure, page, section, table
from nemo_eppo.observability.report_tables import text_table

_MEASURES = {  # metric -> title, what it is, unit
    "reward/proxy": ("Proxy reward", "What the policy is trained on, before penalties.", "standardised reward"),
    "reward/gold": ("Gold reward", "What was meant; the policy is never trained on it.", "gold reward"),
    "reward/held_out": ("Held-out reward", "A reward model that is only reported.", "standardised reward"),
    "kl/policy_reference": ("KL divergence", "How far the policy has moved from the reference.", "nats"),
    "energy/policy": ("Energy loss", "L1 energy that the last layer takes away from the policy's responses.", "energy"),
    "rollout/response_length": ("Response length", "Tokens, the end-of-sequence token included.", "tokens"),
}
_OF_EVERY_RUN = ("exp_manager.",)  # settings that differ, but say nothing


@dataclass(frozen=True)
class _Run:
    directory: Path
    curves: Mapping[str, tuple[list[int], list[float]]]
    settings: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    @property
    def final(self) -> dict[str, float]:
        """Values of the last step that has them."""
        return {name: self.curves[name][1][-1] for name in _MEASURES if name in self.curves}


def compare_runs(directories: Mapping[str, Path], out: Path) -> str:
    """Write comparison.html and comparison.json about the runs in these directories, by name, into `out`.

    Returns:
        the table of what the runs ended with, for the terminal.
    """
    runs = {name: _read(directory) for name, directory in directories.items()}
    keys = sorted({key for run in runs.values() for key in run.settings})
    differ = [key for key in keys if len({repr(run.settings.get(key)) for run in runs.values()}) > 1]
    found = {
        name: {
            "directory": str(run.directory),
            "steps": run.steps,
            "settings": {key: run.settings.get(key) for key in differ},
            "final": run.final,
        }
        for name, run in runs.items()
    }
    write_atomically(out / "comparison.json", json.dumps({"runs": found}, indent=2) + "\n")
    write_atomically(out / "comparison.html", page("Comparison of runs", list(_body(runs, differ))))
    return text_table("At the last step", _final_rows(runs))


def _read(directory: Path) -> _Run:
    settings = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    flat = {key: value for key, value in _flat(settings, "") if not key.startswith(_OF_EVERY_RUN)}
    return _Run(directory, read_metrics(directory / FILE_NAME), flat)


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in ("url", "token"):  # of servers: another at every start
            yield f"{prefix}{key}", value


def _body(runs: Mapping[str, _Run], differ: list[str]) -> Iterator[str]:
    yield "<h1>Comparison of runs</h1>"
    measures = [name for name in _MEASURES if any(name in run.curves for run in runs.values())]
    yield "<h2>At the last step</h2>" + table(_final_rows(runs))
    figures = []
    for measure in measures:
        title, text, unit = _MEASURES[measure]
        series = [
            Series(name, COLORS[number % len(COLORS)], *run.curves[measure])
            for number, (name, run) in enumerate(runs.items())
            if measure in run.curves
        ]
        figures.append(figure(title, text, line_chart(series, "PPO step", unit)))
    yield section("Over the course of training", "Means over the rollouts of each step.", figures)
    if differ:
        rows = [["", *runs], *([key, *(_text(run.settings.get(key)) for run in runs.values())] for key in differ)]
        yield "<h2>Settings that differ</h2>" + table(rows)


def _final_rows(runs: Mapping[str, _Run]) -> list[list[str]]:
    measures = [name for name in _MEASURES if any(name in run.curves for run in runs.values())]
    rows = [["", "Steps", *(_MEASURES[name][0] for name in measures)]]
    return rows + [[name, str(run.steps), *(_number(run.final.get(m)) for m in measures)] for name, run in runs.items()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
