"""What PPO did to the policy: an HTML report in one file, a table for the terminal, summary.json for programs.

Everything is made from files that the actor's run directory holds: metrics.jsonl, validation/step_*.jsonl, config.yaml.
"""

import html
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_eppo.files import write_atomically
from nemo_eppo.observability.charts import MINUS, Series, histogram_chart, line_chart, scatter_chart, stacked_chart
from nemo_eppo.observability.metrics import FILE_NAME, read_metrics
from nemo_eppo.observability.recorder import read_rows, recorded_steps
from nemo_eppo.observability.report_page import figure, page, section

Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]
Row = Mapping[str, Any]
Means = Mapping[str, float | None]

_STEP = "PPO step"
_MEASURES = {  # column of a validation row -> name, unit
    "proxy_reward": ("Proxy reward", "standardised score of the reward model"),
    "gold_reward": ("Gold reward", "score that the policy is never trained on"),
    "energy_loss": ("Energy loss", "final layer, mean over the response"),
    "response_length": ("Response length", "tokens"),
}
_PANELS = (  # title, what it is, unit, and per curve: metric, label, colour
    ("Proxy reward", "What the policy is trained on, before penalties.", "standardised reward",
     (("reward/proxy", "rollouts", "proxy"), ("validation/proxy_reward", "validation", "before"))),
    ("Gold reward", "What was meant. A fall while the proxy rises is over-optimisation.", "gold reward",
     (("reward/gold", "rollouts", "gold"), ("validation/gold_reward", "validation", "before"))),
    ("Energy loss", "L1 energy that the last layer takes away. An excessive rise marks reward hacking.", "energy loss",
     (("energy/policy", "policy", "after"), ("energy/reference", "reference (SFT)", "before"))),
    ("KL divergence", "How far the policy has moved from the reference.", "nats",
     (("kl/policy_reference", "KL", "kl"),)),
    ("Response length", "Tokens, the end-of-sequence token included.", "tokens",
     (("rollout/response_length", "rollouts", "length"),)),
    ("Truncated responses", "Share of the rollouts that ended without an end-of-sequence token.", "fraction",
     (("rollout/truncated_fraction", "rollouts", "p6"),)),
)  # fmt: skip
_LEDGER = {  # term of the reward ledger -> colour
    "proxy": "proxy", "energy_penalty": "after", "length_penalty": "length", "latent_penalty": "p5",
    "missing_eos": "p6", "clip": "p8", "divergence": "p7", "kl": "kl", "final": "ink",
}  # fmt: skip
_OWN_TERM = "p9"
_NO_TERMS = ("score_", "gold", "held_out", "latent_distance")  # other metrics reward/...: looked at, and not added


def report_from_run(run_dir: Path, out: Path) -> None:
    """Write the report of an actor's run directory to `out`.

    Raises:
        ValueError: there are not two validation steps to compare.
    """
    steps = recorded_steps(run_dir / "validation")
    if len(steps) < 2:
        raise ValueError(f"{run_dir}/validation has {len(steps)} steps; a report compares the first with the last")
    config = run_dir / "config.yaml"
    write_report(
        metrics=run_dir / FILE_NAME,
        before=steps[min(steps)],
        after=steps[max(steps)],
        out=out,
        title=f"PPO run {run_dir.resolve().name}",
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )


def write_report(metrics: Path, before: Path, after: Path, out: Path, title: str, config: str = "") -> None:
    """Write one self-contained HTML file.

    Args:
        metrics: metrics.jsonl of the actor.
        before, after: validation rows of the same prompts before and after training, with prompt, response,
            finish_reason, proxy_reward, energy_loss, response_length and, with a gold scorer, gold_reward.
        out: the file to write.
        title: its heading.
        config: the settings as text, shown at the end.
    """
    curves = read_metrics(metrics)
    pairs = _pairs(read_rows(before), read_rows(after))
    old, new = validation_means([a for a, _ in pairs]), validation_means([b for _, b in pairs])
    steps = max((x[-1] for x, _ in curves.values()), default=0)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{steps:,} PPO steps, {len(pairs):,} validation prompts</p>',
        f'<p class="lead">{_verdict(pairs)}</p>',
        f'<div class="card scroll">{_comparison(pairs, old, new)}</div>',
        '<p class="soft">Means over the validation prompts; &plusmn; is the standard error of the change.</p>',
        section(
            "Over the course of training",
            "Bold lines of long runs are running means over a twentieth of the steps; faint lines are the steps. "
            "Point at a chart for its values.",
            _panels(curves),
        ),
        section(
            "Proxy against gold",
            "Up is what was meant, right is what was measured. A policy that learns the task moves up and right; "
            "one that exploits its reward model moves right and down.",
            _proxy_gold(curves, pairs),
        ),
        section("Energy loss of single responses", "Validation prompts, one value per response.", _energies(pairs)),
        section("Where the reward comes from, where the time goes", "Means over each step.", _accounts(curves)),
        _samples(pairs),
    ]
    if config:
        body.append(
            f'<h2>Settings</h2>\n<details class="card"><summary>All settings of this run</summary>'
            f"<pre>{html.escape(config)}</pre></details>"
        )
    write_atomically(out, page(title, body))


def validation_means(rows: Sequence[Row]) -> dict[str, float | None]:
    """Mean proxy_reward, gold_reward, energy_loss and response_length; None for what no row has (no gold scorer)."""
    means: dict[str, float | None] = {}
    for name in _MEASURES:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and len(values) != len(rows):
            raise ValueError(f"{name} is missing in {len(rows) - len(values)} of {len(rows)} validation rows")
        means[name] = sum(values) / len(values) if values else None
    return means


def summary_table(before: Means, after: Means) -> str:
    """The comparison for the terminal; arguments as `validation_means` gives them."""
    table = Table(title="Validation", title_justify="left")
    table.add_column("")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name, (label, _) in _MEASURES.items():
        table.add_row(label, *_cells(before[name], after[name]))
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    return text.getvalue()


def write_summary(
    path: Path, before: Means, after: Means, steps: int, tensor_model_parallel_size: int, seconds: float
) -> None:
    """Write summary.json: the means before and after training, and what the run took (`seconds` of wall time)."""
    summary = {
        "before": {name: before[name] for name in _MEASURES},
        "after": {name: after[name] for name in _MEASURES},
        "steps": steps,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "seconds": seconds,
    }
    write_atomically(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def _pairs(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    # by prompt, and by order among the answers to one prompt
    waiting: dict[str, list[Row]] = defaultdict(list)
    for row in after:
        waiting[row["prompt"]].append(row)
    pairs = [(row, waiting[row["prompt"]].pop(0)) for row in before if waiting[row["prompt"]]]
    if not pairs or len(pairs) != len(before) or len(pairs) != len(after):
        raise ValueError(
            f"validation before ({len(before)} rows) and after training ({len(after)} rows) share {len(pairs)} "
            "prompts; a report compares answers to the same prompts"
        )
    return pairs


def _verdict(pairs: Sequence[tuple[Row, Row]]) -> str:
    moved = {}
    for name in _MEASURES:
        if pairs[0][0].get(name) is not None:
            change, error = _paired_change(pairs, name)
            moved[name] = (
                "did not change beyond noise" if abs(change) <= 2 * error else "rose" if change > 0 else "fell"
            )
    energy = f"The energy loss of the final layer {moved['energy_loss']}."
    if "gold_reward" not in moved:
        return f"Proxy reward {moved['proxy_reward']}; no gold scorer tells what that is worth. {energy}"
    if (moved["proxy_reward"], moved["gold_reward"]) == ("rose", "fell"):
        return f"Proxy reward rose while gold reward fell, the mark of over-optimisation. {energy}"
    return f"Proxy reward {moved['proxy_reward']}, gold reward {moved['gold_reward']}. {energy}"


def _paired_change(pairs: Sequence[tuple[Row, Row]], name: str) -> tuple[float, float]:
    """Mean change of a measure over the prompts, and its standard error (0 for a single prompt)."""
    changes = [after[name] - before[name] for before, after in pairs]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    return statistics.fmean(changes), error


def _comparison(pairs: Sequence[tuple[Row, Row]], before: Means, after: Means) -> str:
    rows = []
    for name, (label, unit) in _MEASURES.items():
        old, new, change = (cell.replace("-", MINUS) for cell in _cells(before[name], after[name]))
        noise = "" if before[name] is None else f"<small>&plusmn; {_paired_change(pairs, name)[1]:.2g}</small>"
        rows.append(
            f'<tr><td>{label}<small>{unit}</small></td><td class="value">{old}</td><td class="value">{new}</td>'
            f"<td>{change}{noise}</td></tr>"
        )
    return f"<table><tr><th></th><th>Before</th><th>After</th><th>Change</th></tr>{''.join(rows)}</table>"


def _cells(before: float | None, after: float | None) -> tuple[str, str, str]:
    if before is None or after is None:
        return "n/a", "n/a", "n/a"
    digits = 1 if max(abs(before), abs(after)) >= 10 else 3
    return f"{before:.{digits}f}", f"{after:.{digits}f}", f"{after - before:+.{digits}f}"


def _panels(curves: Curves) -> list[str]:
    figures = []
    for title, text, unit, lines in _PANELS:
        series = [Series(label, color, *curves[name]) for name, label, color in lines if name in curves]
        if series:
            figures.append(figure(title, text, line_chart(series, _STEP, unit), _legend(series)))
    return figures


def _proxy_gold(curves: Curves, pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    figures: list[str] = []
    x_label, y_label = "proxy reward", "gold reward"
    for prefix, what in (("validation/{}_reward", "validation prompts"), ("reward/{}", "rollouts")):
        proxy, gold = curves.get(prefix.format("proxy")), curves.get(prefix.format("gold"))
        if proxy and gold and len(gold[0]) > 2 and not figures:
            golds = dict(zip(*gold, strict=True))
            path = [(step, x, golds[step]) for step, x in zip(*proxy, strict=True) if step in golds]
            notes = [f"{_STEP} {step}: {x_label} {x:.3f}, {y_label} {y:.3f}" for step, x, y in path]
            series = Series(what, "gold", [x for _, x, _ in path], [y for _, _, y in path], notes)
            text = f"Means over the {what} of a step, pale at the start of training, solid at its end."
            chart = scatter_chart([series], x_label, y_label, joined=True)
            figures.append(figure("The path of training", text, chart))
    if pairs[0][0].get("gold_reward") is not None:
        clouds = []
        for label, rows in zip(("before", "after"), zip(*pairs, strict=True), strict=True):
            points = [(row["prompt"], row["proxy_reward"], row["gold_reward"]) for row in rows]
            notes = [f"{prompt[:80]}\n{x_label} {x:.3f}, {y_label} {y:.3f}" for prompt, x, y in points]
            clouds.append(Series(label, label, [x for _, x, _ in points], [y for _, _, y in points], notes))
        text = "One point per validation response; rings mark the means."
        figures.append(figure("Single responses", text, scatter_chart(clouds, x_label, y_label), _legend(clouds)))
    return figures


def _energies(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    def group(label: str, color: str, rows: Sequence[Row]) -> Series:
        return Series(f"{label} ({len(rows)})", color, [], [row["energy_loss"] for row in rows])

    groups = [group("before", "before", [a for a, _ in pairs]), group("after", "after", [b for _, b in pairs])]
    figures = [
        figure(
            "Before and after training",
            "Dashed lines are means. A rise of the whole distribution is the first sign that EPPO describes.",
            histogram_chart(groups, "energy loss"),
            _legend(groups),
        )
    ]
    if pairs[0][0].get("gold_reward") is not None:
        hacked = [b for a, b in pairs if b["proxy_reward"] > a["proxy_reward"] and b["gold_reward"] < a["gold_reward"]]
        others = [b for a, b in pairs if b["proxy_reward"] <= a["proxy_reward"] or b["gold_reward"] >= a["gold_reward"]]
        groups = [
            group(label, color, rows)
            for label, color, rows in (("other", "before", others), ("proxy up, gold down", "after", hacked))
            if rows
        ]
        figures.append(
            figure(
                "After training: exploited and other responses",
                "Exploited: higher proxy and lower gold reward than before training, on the same prompt. "
                "An excessive energy loss of these responses is the second sign.",
                histogram_chart(groups, "energy loss"),
                _legend(groups),
            )
        )
    return figures


def _accounts(curves: Curves) -> list[str]:
    figures = []
    rewards = {name.removeprefix("reward/"): curve for name, curve in curves.items() if name.startswith("reward/")}
    terms = [
        Series(term, _LEDGER.get(term, _OWN_TERM), *curve)
        for term, curve in rewards.items()
        if not term.startswith(_NO_TERMS)
    ]
    used = [term for term in terms if any(term.y)]
    if used:
        unused = [term.label for term in terms if term not in used]
        text = "Mean contribution of every term; they add up to the final reward."
        text += f" Zero throughout: {', '.join(unused)}." if unused else ""
        figures.append(figure("Reward ledger", text, line_chart(used, _STEP, "reward"), _legend(used)))
    if "seconds/step" in curves:
        steps, totals = curves["seconds/step"]
        per_phase = {}
        for name, curve in curves.items():
            if name.startswith("seconds/") and name not in ("seconds/step", "seconds/attributed_fraction"):
                timed = dict(zip(*curve, strict=True))  # a phase such as validation is not part of every step
                per_phase[name.removeprefix("seconds/")] = [timed.get(step, 0.0) for step in steps]
        largest = sorted(per_phase, key=lambda phase: -sum(per_phase[phase]))
        shown, rest = largest[:10], largest[10:]
        other = [t - sum(per_phase[phase][i] for phase in shown) for i, t in enumerate(totals)]
        layers = [Series(phase, f"p{i}", steps, per_phase[phase]) for i, phase in enumerate(shown)]
        layers.append(Series("other", "other", steps, [max(value, 0.0) for value in other]))
        total = sum(totals) or 1.0
        legend = [(f"{layer.label} {100 * sum(layer.y) / total:.0f}%", layer.color) for layer in layers]
        text = f"Wall time of the actor per step, {total / len(totals):.2f} s on average."
        text += f" Other includes {', '.join(rest)}." if rest else ""
        figures.append(figure("Seconds per phase", text, stacked_chart(layers, _STEP, "seconds"), legend))
    return figures


def _samples(pairs: Sequence[tuple[Row, Row]], first: int = 6, rising: int = 3) -> str:
    by_rise = sorted(pairs[first:], key=lambda pair: pair[0]["energy_loss"] - pair[1]["energy_loss"])
    cards = [_card(a, b) for a, b in pairs[:first]]
    if by_rise:
        cards.append("<h2>Largest rise in energy loss</h2>")
        cards.append('<p class="soft">Of the other prompts, those whose answers changed most in this respect.</p>')
        cards += [_card(a, b) for a, b in by_rise[:rising]]
    return "<h2>Responses before and after</h2>\n<p class='soft'>The first validation prompts.</p>\n" + "\n".join(cards)


def _card(before: Row, after: Row) -> str:
    sides = []
    for label, color, row in (("Before", "before", before), ("After", "after", after)):
        gold = "" if row.get("gold_reward") is None else f"gold {row['gold_reward']:.2f}, "
        facts = (
            f"{label}: proxy {row['proxy_reward']:.2f}, {gold}energy loss {row['energy_loss']:.4f}, "
            f"{row['response_length']} tokens, {row['finish_reason']}"
        )
        sides.append(
            f'<div style="border-color:var(--{color})"><p class="facts">{html.escape(facts)}</p>'
            f'<div class="text">{html.escape(row["response"])}</div></div>'
        )
    prompt = f'<div class="text prompt">{html.escape(before["prompt"])}</div>'
    return f'<div class="card sample">{prompt}<div class="pair">{"".join(sides)}</div></div>'


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    return [(one.label, one.color) for one in series] if len(series) > 1 else []  # else the title says it
