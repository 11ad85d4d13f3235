"""Reports how PPO changed the policy: an HTML report in one file, a table for the terminal, summary.json for programs.

Everything is read from the actor's run directory: metrics.jsonl, validation/step_*.jsonl, config.yaml.
"""

import html
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_eppo.files import write_atomically
from nemo_eppo.observability.accounts import accounts
from nemo_eppo.observability.charts import COLORS, GRAY, Chart, Histogram, Lines, Scatter, Series
from nemo_eppo.observability.chat import turns
from nemo_eppo.observability.metrics import FILE_NAME, MEASURES, Curves, read_metrics
from nemo_eppo.observability.peak import find_peak
from nemo_eppo.observability.recorder import read_rows, recorded_steps
from nemo_eppo.observability.report_page import page, sample_card, section, titled
from nemo_eppo.observability.report_tables import alarms_table, read_config, settings_table, text_table

Row = Mapping[str, Any]
Means = Mapping[str, float | None]

_STEP = "PPO step"
_FIRST, _RISING = 6, 3  # responses shown: of the first prompts, and of those whose energy loss rose most
_MINUS = "\N{MINUS SIGN}"
_VALIDATED = {  # column of a validation row -> metric of the rollouts with the same meaning
    "proxy_reward": "reward/proxy",
    "gold_reward": "reward/gold",
    "energy_loss": "energy/policy",
    "response_length": "rollout/response_length",
}
_GOLD, _AFTER = COLORS[3], COLORS[1]
_COLORS = (COLORS[0], _GOLD, COLORS[6], _AFTER, COLORS[4], COLORS[2], COLORS[5])  # of MEASURES


def report_from_run(run_dir: Path, out: Path) -> None:
    """Write the report of an actor's run directory to `out`, as one HTML file without external resources.

    The rows in validation/ have prompt, response, finish_reason, proxy_reward, energy_loss, response_length and, with
    a gold reward, gold_reward.

    Raises:
        ValueError: there are not two validation steps to compare, or they are not about the same prompts.
    """
    validation = {step: read_rows(path) for step, path in recorded_steps(run_dir / "validation").items()}
    if len(validation) < 2:
        raise ValueError(f"{run_dir}/validation has {len(validation)} steps; a report compares the first with the last")
    curves = read_metrics(run_dir / FILE_NAME)
    pairs = _pairs(validation[min(validation)], validation[max(validation)])
    old, new = validation_means([a for a, _ in pairs]), validation_means([b for _, b in pairs])
    steps = max((x[-1] for x, _ in curves.values()), default=0)
    title = f"PPO run {run_dir.resolve().name}"
    config_file = run_dir / "config.yaml"
    config, start = read_config(config_file) if config_file.exists() else ({}, {})
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{steps:,} PPO steps, {len(pairs):,} validation prompts</p>',
        f'<p class="lead">{_verdict(pairs, curves)}</p>',
        f'<div class="card scroll">{_comparison(pairs, old, new)}</div>',
        '<p class="soft">Means over the validation prompts; &plusmn; is the standard error of the change.</p>',
        titled("Settings", settings_table(config, start)),
        titled("Alarms of the hacking monitor", alarms_table(curves, config)),
        section(
            "Over the course of training",
            "Bold lines of long runs are running means over a twentieth of the steps; faint lines are the steps. "
            "The band around a validation mean is its standard error. Point at a chart for its values, draw a "
            "rectangle to zoom, double-click to zoom out.",
            _panels(curves, validation),
        ),
        section(
            "Proxy against gold",
            "Up is the gold reward, right the proxy reward. A policy that learns the task moves up and right; "
            "one that exploits its reward model moves right and down.",
            _proxy_gold(curves, pairs),
        ),
        section("Energy loss of single responses", "Validation prompts, one value per response.", _energies(pairs)),
        section("Where the reward comes from, where the time goes", "Means over each step.", accounts(curves)),
        _samples(pairs),
    ]
    if config_file.exists():
        body.append(
            f'<h2>All settings</h2>\n<details class="card"><summary>config.yaml of this run</summary>'
            f"<pre>{html.escape(config_file.read_text(encoding='utf-8'))}</pre></details>"
        )
    write_atomically(out, page(title, body))


def validation_means(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the mean of every validation measure; None if no row has it, as without a gold reward.

    Raises:
        ValueError: some rows have a measure and others do not.
    """
    means: dict[str, float | None] = {}
    for name in _VALIDATED:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and len(values) != len(rows):
            raise ValueError(f"{name} is missing in {len(rows) - len(values)} of {len(rows)} validation rows")
        means[name] = sum(values) / len(values) if values else None
    return means


def summary_table(before: Means, after: Means) -> str:
    """Return the comparison as text for the terminal; the arguments are results of `validation_means`."""
    cells = {MEASURES[metric][0]: _cells(before[name], after[name]) for name, metric in _VALIDATED.items()}
    rows = [[label, *values] for label, values in cells.items() if values]
    return text_table("Validation", [["", "before", "after", "change"], *rows], width=80)


def _pairs(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair the rows by prompt; several rows of one prompt are paired in their order."""
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in after:
        by_prompt[row["prompt"]].append(row)
    pairs = [(row, by_prompt[row["prompt"]].pop(0)) for row in before if by_prompt[row["prompt"]]]
    if not pairs or len(pairs) != len(before) or len(pairs) != len(after):
        raise ValueError(
            f"validation before ({len(before)} rows) and after training ({len(after)} rows) share {len(pairs)} "
            "prompts; a report compares answers to the same prompts"
        )
    return pairs


def _verdict(pairs: Sequence[tuple[Row, Row]], curves: Curves) -> str:
    moved = {}
    for name in _VALIDATED:
        if _has(pairs[0], name):
            change, error = _paired_change(pairs, name)
            moved[name] = (
                "did not change beyond noise" if abs(change) <= 2 * error else "rose" if change > 0 else "fell"
            )
    energy = f"The energy loss of the final layer {moved['energy_loss']}."
    if "gold_reward" not in moved:
        return f"Proxy reward {moved['proxy_reward']}; there is no gold reward to compare it with. {energy}"
    if (moved["proxy_reward"], moved["gold_reward"]) == ("rose", "fell"):
        return f"Proxy reward rose while gold reward fell, the mark of over-optimisation. {energy}"
    gold, (steps, values) = moved["gold_reward"], curves.get("reward/gold", ((), ()))
    if values and gold != "fell" and (peak := find_peak(values)).fell:
        gold += f" over all, but fell by {peak.fall:.2g} from its peak at step {steps[peak.place]}"
        gold += ", the mark of over-optimisation" if moved["proxy_reward"] == "rose" else ""
    return f"Proxy reward {moved['proxy_reward']}, gold reward {gold}. {energy}"


def _paired_change(pairs: Sequence[tuple[Row, Row]], name: str) -> tuple[float, float]:
    """Return the mean change of a measure over the prompts, and its standard error (0 for a single prompt)."""
    return _mean_and_error([after[name] - before[name] for before, after in pairs])


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _has(rows: Sequence[Row], measure: str) -> bool:
    return bool(rows) and rows[0].get(measure) is not None


def _comparison(pairs: Sequence[tuple[Row, Row]], before: Means, after: Means) -> str:
    rows = []
    for name, (label, text, _) in ((name, MEASURES[metric]) for name, metric in _VALIDATED.items()):
        cells = [cell.replace("-", _MINUS) for cell in _cells(before[name], after[name])]
        if not cells:
            continue
        old, new, change = cells
        noise = f"<small>&plusmn; {_paired_change(pairs, name)[1]:.2g}</small>"
        rows.append(
            f'<tr><td>{label}<small>{text}</small></td><td class="value">{old}</td><td class="value">{new}</td>'
            f"<td>{change}{noise}</td></tr>"
        )
    return f"<table><tr><th></th><th>Before</th><th>After</th><th>Change</th></tr>{''.join(rows)}</table>"


def _cells(before: float | None, after: float | None) -> list[str]:
    """Return the texts of before, after and change; none if the measure is missing."""
    if before is None or after is None:
        return []
    digits = 1 if max(abs(before), abs(after)) >= 10 else 3
    return [f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after - before:+.{digits}f}"]


def _panels(curves: Curves, validation: Mapping[int, Sequence[Row]]) -> list[Chart]:
    charts: list[Chart] = []
    for (metric, (title, text, unit)), color in zip(MEASURES.items(), _COLORS, strict=True):
        lines = [(metric, "rollouts", color)]
        if metric == "energy/policy":
            lines = [(metric, "policy", color), ("energy/reference", "reference (SFT)", GRAY)]
        series = [Series(label, color, *curves[name]) for name, label, color in lines if name in curves]
        column = f"{metric.removeprefix('reward/')}_reward"  # only reward/proxy and reward/gold have one
        measured = {step: [row[column] for row in rows] for step, rows in validation.items() if _has(rows, column)}
        if measured:
            means, errors = zip(*map(_mean_and_error, measured.values()), strict=True)
            series.append(Series("validation", GRAY, list(measured), means, errors))
        if series:
            charts.append(Lines(title, text, series, _STEP, unit))
    return charts


def _proxy_gold(curves: Curves, pairs: Sequence[tuple[Row, Row]]) -> list[Chart]:
    charts: list[Chart] = []
    axes = "proxy reward", "gold reward"
    for prefix, label in (("validation/{}_reward", "validation prompts"), ("reward/{}", "rollouts")):
        proxy, gold = curves.get(prefix.format("proxy")), curves.get(prefix.format("gold"))
        if proxy and gold and len(gold[0]) > 2 and not charts:
            golds = dict(zip(*gold, strict=True))
            path = [(step, x, golds[step]) for step, x in zip(*proxy, strict=True) if step in golds]
            notes = [f"{_STEP} {step}" for step, _, _ in path]
            series = Series(label, _GOLD, [x for _, x, _ in path], [y for _, _, y in path], notes=notes)
            text = f"Means over the {label} of a step, pale at the start of training, solid at its end."
            charts.append(Scatter("The path of training", text, [series], *axes, joined=True))
    if _has(pairs[0], "gold_reward"):
        clouds = []
        for label, color, rows in zip(("before", "after"), (GRAY, _AFTER), zip(*pairs, strict=True), strict=True):
            x, y = ([row[name] for row in rows] for name in ("proxy_reward", "gold_reward"))
            clouds.append(Series(label, color, x, y, notes=[_words(row["prompt"])[:80] for row in rows]))
        text = "One point per validation response; rings mark the means."
        charts.append(Scatter("Single responses", text, clouds, *axes))
    return charts


def _energies(pairs: Sequence[tuple[Row, Row]]) -> list[Chart]:
    def group(label: str, color: str, rows: Sequence[Row]) -> Series:
        return Series(f"{label} ({len(rows)})", color, [], [row["energy_loss"] for row in rows])

    groups = [group("before", GRAY, [a for a, _ in pairs]), group("after", _AFTER, [b for _, b in pairs])]
    text = "Dashed lines are means. A rise of the whole distribution is the first sign that EPPO describes."
    charts: list[Chart] = [Histogram("Before and after training", text, groups, "energy loss")]
    if _has(pairs[0], "gold_reward"):
        hacked = [b for a, b in pairs if b["proxy_reward"] > a["proxy_reward"] and b["gold_reward"] < a["gold_reward"]]
        others = [b for a, b in pairs if b["proxy_reward"] <= a["proxy_reward"] or b["gold_reward"] >= a["gold_reward"]]
        groups = [
            group(label, color, rows)
            for label, color, rows in (("other", GRAY, others), ("proxy up, gold down", _AFTER, hacked))
            if rows
        ]
        text = (
            "Exploited: higher proxy and lower gold reward than before training, on the same prompt. "
            "An excessive energy loss of these responses is the second sign."
        )
        charts.append(Histogram("After training: exploited and other responses", text, groups, "energy loss"))
    return charts


def _samples(pairs: Sequence[tuple[Row, Row]]) -> str:
    by_rise = sorted(pairs[_FIRST:], key=lambda pair: pair[0]["energy_loss"] - pair[1]["energy_loss"])
    cards = [_card(a, b) for a, b in pairs[:_FIRST]]
    if by_rise:
        cards.append("<h2>Largest rise in energy loss</h2>")
        cards.append('<p class="soft">Those of the other prompts whose energy loss rose most.</p>')
        cards += [_card(a, b) for a, b in by_rise[:_RISING]]
    return "<h2>Responses before and after</h2>\n<p class='soft'>The first validation prompts.</p>\n" + "\n".join(cards)


def _card(before: Row, after: Row) -> str:
    sides = (("Before", GRAY, before), ("After", _AFTER, after))
    return sample_card(before["prompt"], [(color, facts(label, row), row["response"]) for label, color, row in sides])


def facts(label: str, row: Row) -> str:
    """Return the measures of a validation row as one line, for `sample_card`."""
    gold = "" if row.get("gold_reward") is None else f"gold {row['gold_reward']:.2f}, "
    return (
        f"{label}: proxy {row['proxy_reward']:.2f}, {gold}energy loss {row['energy_loss']:.4f}, "
        f"{row['response_length']} tokens, {row['finish_reason']}"
    )


def _words(text: str) -> str:
    return " ".join(turn.text.strip() for turn in turns(text))
