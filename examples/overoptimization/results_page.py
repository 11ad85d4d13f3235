"""The results of an over-optimisation bench: results.json, report.html, curves.png and a table for the terminal."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import Curves, compare, half_interval, over_distance

from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.observability.charts import COLORS, Lines, Series
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.report_page import page, section
from nemo_eppo.observability.report_tables import plain_table, text_table

_PLAIN, _OURS = "ppo", "eppo"
_COLUMNS = {  # measure -> heading
    "final": "gold, last step",
    "less": "less plain PPO",
    "peak": "gold, peak",
    "equal_kl": "gold, equal KL",
    "wins_over_sft": "wins over SFT",
    f"wins_over_{_OURS}": "wins over EPPO",
    "final_kl": "KL",
    "final_proxy": "proxy",
    "energy_rise": "energy rise",
}
_PER_CHART = 5  # methods in one chart, beside plain PPO and EPPO


def write_results(
    out: Path, runs: Mapping[str, Mapping[int, Curves]], about: Mapping[str, Any], decisions: Mapping[str, Any]
) -> str:
    """Write the results of `runs`, curves by method and seed, into `out`; return the table for the terminal.

    Args:
        about: facts for the page's head.
        decisions: how values and seeds were chosen, for results.json.
    """
    compared = compare(runs, (_PLAIN, _OURS))
    seeds = compared["seeds"]
    curves = {method: {str(seed): _as_dict(by_seed[seed]) for seed in seeds} for method, by_seed in runs.items()}
    write_json(out / "results.json", {"about": dict(about), **decisions, **compared, "curves": curves})
    order = _order(compared)
    ordered = {method: [runs[method][seed] for seed in seeds] for method in order}
    write_atomically(out / "report.html", page("Over-optimisation", _body(compared, order, ordered, about)))
    best = [method for method in order if method not in (_PLAIN, _OURS)][:_PER_CHART]
    shown = [method for method in order if method in (_PLAIN, _OURS, *best)]
    write_picture(out / "curves.png", _charts(shown, ordered))
    return text_table(verdict(compared), _rows(compared, order), width=160)


def verdict(compared: Mapping[str, Any]) -> str:
    """Return a sentence on EPPO's primary measure, beside the best method and plain PPO."""
    methods = compared["methods"]
    order = _order(compared)
    place, own = order.index(_OURS) + 1, methods[_OURS]["final"]
    less = own["less"][_PLAIN]
    if less["low"] is None:
        against = f"One seed proves nothing: EPPO less plain PPO is {_interval(less)}."
    else:
        has = "no clear difference" if less["low"] <= 0 <= less["high"] else "more" if less["low"] > 0 else "less"
        against = f"Against plain PPO EPPO has {has}: {_interval(less)}."
    first = "EPPO has the highest gold reward" if place == 1 else f"EPPO does not win: {order[0]} does"
    best = methods[order[0]]["final"]["value"]
    return f"{first} at the last step ({best:.3f}; EPPO {own['value']:.3f}, place {place} of {len(order)}). {against}"


def _order(compared: Mapping[str, Any]) -> list[str]:
    """Methods from the highest gold reward at the last step down."""
    methods = compared["methods"]
    return sorted(methods, key=lambda method: -methods[method]["final"]["value"])


def _body(
    compared: Mapping[str, Any], order: Sequence[str], curves: Mapping[str, Sequence[Curves]], about: Mapping[str, Any]
) -> list[str]:
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    others = [method for method in order if method not in (_PLAIN, _OURS)]
    groups = [others[start : start + _PER_CHART] for start in range(0, len(others), _PER_CHART)] or [[]]
    charts = [chart for group in groups for chart in _charts([_PLAIN, _OURS, *group], curves)]
    return [
        "<h1>Over-optimisation</h1>",
        f'<p class="lead">{html.escape(verdict(compared))}</p>',
        f'<p class="soft">{html.escape(facts)}; reward-model seeds {", ".join(map(str, compared["seeds"]))}</p>',
        "<h2>All methods</h2>",
        '<p class="soft">Means over seeds, with Student\'s 95% intervals; on how many seeds a method is better than '
        "plain PPO, and the p-value of Wilcoxon's test. In brackets: the number of seeds that reach this KL, if not "
        "all.</p>",
        plain_table(_rows(compared, order)),
        section("Curves", "Means over seeds, with Student's 95% bands; distances that all seeds reach.", charts),
    ]


def _rows(compared: Mapping[str, Any], order: Sequence[str]) -> list[list[str]]:
    return [["", *_COLUMNS.values()], *(_row(compared, method) for method in order)]


def _row(compared: Mapping[str, Any], method: str) -> list[str]:
    measured, seeds = compared["methods"][method], len(compared["seeds"])
    cells = [method]
    for name in _COLUMNS:
        if name == "less":
            less = measured["final"]["less"].get(_PLAIN)
            cells.append("" if less is None else f"{_interval(less)}, {less['higher']:.0f}/{seeds}, p {less['p']:.3f}")
        elif name == f"wins_over_{_OURS}" and method == _OURS:
            cells.append("")
        else:
            cells.append(_interval(measured[name]) if name == "final" else f"{measured[name]['value']:.3f}")
        reached = round(seeds * measured["reaches_equal_kl"]["value"])
        if name == "equal_kl" and reached < seeds:
            cells[-1] += f" ({reached})"
    return cells


def _interval(estimate: Mapping[str, Any]) -> str:
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{interval}"


def _charts(methods: Sequence[str], curves: Mapping[str, Sequence[Curves]]) -> list[Lines]:
    """Return charts of gold and proxy reward over the steps, and over the distance from the SFT model."""
    return [
        Lines(f"{name.capitalize()} reward", ", ".join(methods), series(methods, curves, name), x, f"{name} reward")
        for series, x in _CURVES
        for name in ("gold", "proxy")
    ]


def _over_steps(methods: Sequence[str], curves: Mapping[str, Sequence[Curves]], name: str) -> list[Series]:
    points = ((curves[method][0].steps, [getattr(run, name) for run in curves[method]]) for method in methods)
    return _bands(methods, points)


def _over_distance(methods: Sequence[str], curves: Mapping[str, Sequence[Curves]], name: str) -> list[Series]:
    return _bands(methods, (over_distance(curves[method], name) for method in methods))


def _bands(methods: Sequence[str], points: Iterable[tuple[Any, Any]]) -> list[Series]:
    """Return the mean of each method over its curves, x [points] and y [seeds, points], with a band over several."""
    return [
        Series(
            method,
            COLORS[number % len(COLORS)],
            list(x),
            np.mean(y, axis=0).tolist(),
            [half_interval(values) for values in np.transpose(y)] if len(y) > 1 else (),
        )
        for number, (method, (x, y)) in enumerate(zip(methods, points, strict=True))
    ]


_CURVES = ((_over_steps, "PPO step"), (_over_distance, "square root of the KL to the SFT model, in nats"))


def _as_dict(run: Curves) -> dict[str, list[float]]:
    arrays = {name: getattr(run, name).round(5).tolist() for name in ("gold", "proxy", "kl", "energy", "length")}
    return {"steps": list(run.steps), **arrays}
