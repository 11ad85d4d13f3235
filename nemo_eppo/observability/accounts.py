"""Where the reward comes from and where the time goes: the ledger's terms and the seconds of each phase of a step."""

import re
import statistics
from collections.abc import Mapping, Sequence

from nemo_eppo.observability.charts import COLORS, GRAY, Bars, Chart, Lines, Series, Stack
from nemo_eppo.observability.metrics import Curves

_STEP = "PPO step"
_LONGEST = 6  # phases that a comparison shows
_NOT_SUMMED = re.compile(r"score_\d+|gold|held_out|latent_distance")  # metrics reward/... that are not part of the sum


def accounts(curves: Curves) -> list[Chart]:
    """Return the charts of one run: its ledger over the steps, and the seconds of each phase."""
    charts: list[Chart] = []
    terms = _ledger(curves)
    used = [term for term, (_, values) in terms.items() if any(values)]
    if used:
        unused = [term for term in terms if term not in used]
        text = "Mean contribution of every term; they add up to the final reward."
        text += f" Zero throughout: {', '.join(unused)}." if unused else ""
        colors = [GRAY if term == "final" else COLORS[i % len(COLORS)] for i, term in enumerate(used)]
        series = [Series(term, color, *terms[term]) for term, color in zip(used, colors, strict=True)]
        charts.append(Lines("Reward ledger", text, series, _STEP, "reward"))
    if "seconds/step" in curves:
        steps, totals = _totals(curves)
        seconds = _seconds(curves)
        shown, rest = list(seconds)[: len(COLORS)], list(seconds)[len(COLORS) :]
        layers = {phase: seconds[phase] for phase in shown} | {"other": _other(totals, seconds, shown)}
        total = sum(totals) or 1.0
        series = [
            Series(f"{phase} {100 * sum(values) / total:.0f}%", color, steps, values)
            for (phase, values), color in zip(layers.items(), [*COLORS[: len(shown)], GRAY], strict=True)
        ]
        text = f"Wall time of the actor per step, {total / len(totals):.2f} s on average, validation included."
        text += f" Other includes {', '.join(rest)}." if rest else ""
        charts.append(Stack("Seconds per phase", text, series, _STEP, "seconds"))
    return charts


def compared_accounts(runs: Mapping[str, Curves], colors: Mapping[str, str]) -> list[Chart]:
    """Return the charts of several runs, by name: each term of their ledgers, and the mean seconds of each phase."""
    charts: list[Chart] = []
    ledgers = {name: _ledger(curves) for name, curves in runs.items()}
    terms = dict.fromkeys(term for ledger in ledgers.values() for term, (_, values) in ledger.items() if any(values))
    for term in terms:
        series = [Series(name, colors[name], *ledger[term]) for name, ledger in ledgers.items() if term in ledger]
        text = "What the policy was trained on." if term == "final" else "Mean contribution to the final reward."
        charts.append(Lines(f"Ledger: {term}", text, series, _STEP, "reward"))
    timed = {name: curves for name, curves in runs.items() if "seconds/step" in curves}
    if timed:
        seconds = {name: _seconds(curves) for name, curves in timed.items()}
        means: dict[str, float] = {}  # of each phase, summed over the runs
        for phases in seconds.values():
            for phase, values in phases.items():
                means[phase] = means.get(phase, 0.0) + statistics.fmean(values)
        shown = sorted(means, key=lambda phase: -means[phase])[:_LONGEST]
        parts = [
            Series(phase, color, [], [statistics.fmean(phases.get(phase, [0.0])) for phases in seconds.values()])
            for phase, color in zip(shown, COLORS, strict=False)
        ]
        others = [_other(_totals(curves)[1], seconds[name], shown) for name, curves in timed.items()]
        parts.append(Series("other", GRAY, [], [statistics.fmean(values) for values in others]))
        text = "Mean wall time of the actor's steps, validation included."
        charts.append(Bars("Seconds per phase", text, parts, "seconds", names=list(timed)))
    return charts


def _ledger(curves: Curves) -> dict[str, tuple[Sequence[int], Sequence[float]]]:
    """Return the curves of the terms that add up to the final reward, and of the final reward."""
    terms = {name.removeprefix("reward/"): curve for name, curve in curves.items() if name.startswith("reward/")}
    return {term: curve for term, curve in terms.items() if not _NOT_SUMMED.fullmatch(term)}


def _totals(curves: Curves) -> tuple[Sequence[int], list[float]]:
    """Return the steps and the seconds of each, work after the step, such as validation, included."""
    steps, totals = curves["seconds/step"]
    after = dict(zip(*curves.get("seconds/after_step", ((), ())), strict=True))
    return steps, [total + after.get(step, 0.0) for step, total in zip(steps, totals, strict=True)]


def _seconds(curves: Curves) -> dict[str, list[float]]:
    """Return the seconds of each phase, for every step of seconds/step; the longest phase first."""
    steps = curves["seconds/step"][0]
    phases = {}
    for name, curve in curves.items():
        if name.startswith("seconds/") and name not in ("seconds/step", "seconds/attributed_fraction"):
            timed = dict(zip(*curve, strict=True))  # not every step has each phase
            phases[name.removeprefix("seconds/")] = [timed.get(step, 0.0) for step in steps]
    return dict(sorted(phases.items(), key=lambda phase: -sum(phase[1])))


def _other(totals: Sequence[float], seconds: Mapping[str, Sequence[float]], shown: Sequence[str]) -> list[float]:
    """Return the seconds of every step outside the shown phases."""
    explained = (sum(seconds[phase][step] for phase in shown if phase in seconds) for step in range(len(totals)))
    return [max(total - phases, 0.0) for total, phases in zip(totals, explained, strict=True)]
