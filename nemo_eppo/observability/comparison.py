"""Compares runs of the actor: one HTML page with their curves in the same charts, a table, JSON and a picture.

Everything is read from their run directories: metrics.jsonl, config.yaml, and validation/ where there is one.
"""

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_eppo.config import flat
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.observability.accounts import compared_accounts
from nemo_eppo.observability.charts import COLORS, Lines, Series
from nemo_eppo.observability.metrics import FILE_NAME, MEASURES, Curves, read_metrics
from nemo_eppo.observability.recorder import read_rows, recorded_steps
from nemo_eppo.observability.report import facts
from nemo_eppo.observability.report_page import page, sample_card, section, titled
from nemo_eppo.observability.report_tables import alarms_table, plain_table, read_config, text_table

_STEP = "PPO step"
_RUN_DIRECTORY = "exp_manager."  # settings that differ between any two runs, as do the servers' addresses
_SAMPLES = 6


@dataclass(frozen=True)
class _Run:
    directory: Path
    curves: Curves
    config: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    @property
    def final(self) -> dict[str, float]:
        """The last value of each measure that the run has."""
        return {name: self.curves[name][1][-1] for name in MEASURES if name in self.curves}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by their dotted paths, without those that differ between any two runs."""
        leaves = flat(self.config, lists=True)
        return {key: value for key, value in leaves if not key.startswith(_RUN_DIRECTORY) and not key.endswith(".url")}


def compare_runs(directories: Mapping[str, Path], out: Path) -> str:
    """Write comparison.html, .json and .png about the runs in these directories, by name, into `out`.

    Returns:
        the table of the runs' last metrics, for the terminal.
    """
    runs = _read(directories)
    write_atomically(out / "comparison.html", page("Comparison of runs", list(_body(runs))))
    return _summarise(runs, out / "comparison")


def summarise_runs(directories: Mapping[str, Path], stem: Path) -> str:
    """Write the JSON and the picture of `compare_runs`, without its page, to `stem` with the suffixes .json and .png.

    Returns:
        the table of the runs' last metrics, for the terminal.
    """
    return _summarise(_read(directories), stem)


def _summarise(runs: Mapping[str, _Run], stem: Path) -> str:
    from nemo_eppo.observability.pictures import write_picture  # a second of import

    differing = _differing_settings(runs)
    summaries = {
        name: {
            "directory": str(run.directory),
            "steps": run.steps,
            "settings": {key: run.settings.get(key) for key in differing},
            "final": run.final,
        }
        for name, run in runs.items()
    }
    write_json(stem.with_suffix(".json"), {"runs": summaries})
    if charts := _charts(runs):
        write_picture(stem.with_suffix(".png"), charts)
    return text_table("At the last step", _final_rows(runs))


def _read(directories: Mapping[str, Path]) -> dict[str, _Run]:
    return {
        name: _Run(directory, read_metrics(directory / FILE_NAME), read_config(directory / "config.yaml")[0])
        for name, directory in directories.items()
    }


def _differing_settings(runs: Mapping[str, _Run]) -> list[str]:
    all_settings = [run.settings for run in runs.values()]
    keys = sorted({key for settings in all_settings for key in settings})
    return [key for key in keys if len({repr(settings.get(key)) for settings in all_settings}) > 1]


def _measured(runs: Mapping[str, _Run]) -> list[str]:
    return [name for name in MEASURES if any(name in run.curves for run in runs.values())]


def _colors(runs: Mapping[str, _Run]) -> dict[str, str]:
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(runs)}


def _charts(runs: Mapping[str, _Run]) -> list[Lines]:
    colors, charts = _colors(runs), []
    for measure in _measured(runs):
        title, text, unit = MEASURES[measure]
        curves = {name: run.curves[measure] for name, run in runs.items() if measure in run.curves}
        series = [Series(name, colors[name], *curve) for name, curve in curves.items()]
        charts.append(Lines(title, text, series, _STEP, unit))
    return charts


def _body(runs: Mapping[str, _Run]) -> Iterator[str]:
    yield "<h1>Comparison of runs</h1>"
    yield "<h2>At the last step</h2>" + plain_table(_final_rows(runs))
    all_settings = [run.settings for run in runs.values()]
    rows = [[key, *(_text(settings.get(key)) for settings in all_settings)] for key in _differing_settings(runs)]
    yield titled("Settings that differ", plain_table([["", *runs], *rows]) if rows else "")
    yield section("Over the course of training", "Means over the rollouts of each step.", _charts(runs))
    charts = compared_accounts({name: run.curves for name, run in runs.items()}, _colors(runs))
    yield section("Where the reward comes from, where the time goes", "Means over each step.", charts)
    alarms = {name: alarms_table(run.curves, run.config) for name, run in runs.items()}
    shown = (f"<h3>{html.escape(name)}</h3>\n{alarm}" for name, alarm in alarms.items() if alarm)
    yield titled("Alarms of the hacking monitor", "\n".join(shown))
    yield titled("Responses at the last validation", _samples(runs))


def _samples(runs: Mapping[str, _Run]) -> str:
    """Return, as HTML, the answers of all runs to the first prompts that all of them were validated on."""
    answers: list[dict[str, Mapping[str, Any]]] = []
    for run in runs.values():
        steps = recorded_steps(run.directory / "validation")
        rows = read_rows(steps[max(steps)]) if steps else []
        answers.append({row["prompt"]: row for row in reversed(rows)})
    shared = [prompt for prompt in reversed(answers[0]) if all(prompt in rows for rows in answers)][:_SAMPLES]
    colors = _colors(runs)
    return "\n".join(
        sample_card(
            prompt,
            [
                (colors[name], facts(name, rows[prompt]), rows[prompt]["response"])
                for name, rows in zip(runs, answers, strict=True)
            ],
        )
        for prompt in shared
    )


def _final_rows(runs: Mapping[str, _Run]) -> list[list[str]]:
    measures = _measured(runs)
    rows = [["", "Steps", *(MEASURES[name][0] for name in measures)]]
    return rows + [[name, str(run.steps), *(_number(run.final.get(m)) for m in measures)] for name, run in runs.items()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
