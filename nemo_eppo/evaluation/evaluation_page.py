"""The page and the picture of an evaluation."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_eppo.evaluation.best_of_n import GaoFit
from nemo_eppo.evaluation.detection import Detector, detectors_table
from nemo_eppo.evaluation.evaluation_results import MEASURES, Results, Row, Selection
from nemo_eppo.evaluation.intervals import Estimate
from nemo_eppo.files import write_atomically
from nemo_eppo.observability.charts import COLORS, GRAY, Chart, Histogram, Lines, Scatter, Series
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.report_page import page, sample_card, section
from nemo_eppo.observability.report_tables import table

_SHOWN = 8  # prompts on the page
_POLICY, _REFERENCE, _GOLD = COLORS[1], GRAY, COLORS[3]
_KL = "KL divergence from the policy, nats"
_FITTED = (
    "Points are unbiased estimates. The band holds 95% of bootstrap draws, over prompts, of the fit d (a - b d) of Gao "
    "et al., d = sqrt(KL)."
)
_HISTOGRAMS = {  # measure -> label of the axis, the same measure of the reference
    "energy_loss": ("energy loss", "reference_energy_loss"),
    "kl": ("log-ratio of a response, nats", None),
    "response_length": ("tokens", None),
    "latent_distance": ("distance from the latents of SFT responses", None),
}


def write_page(directory: Path, results: Results, settings: Mapping[str, Any]) -> None:
    """Write report.html and evaluation.png into a directory.

    Args:
        settings: those of `EvaluateConfig`, as plain containers.
    """
    selections, responses = list(_best_of_n_charts(results.best_of_n)), list(_response_charts(results.rows))
    write_picture(directory / "evaluation.png", [*selections, *responses])
    body = [
        "<h1>Evaluation</h1>",
        f'<p class="soft">{results.prompts:,} prompts, {len(results.rows):,} responses</p>',
        *_verdict(results.best_of_n),
        table(["", "Mean"], _means(results), "means"),
        '<p class="soft">Means over prompts of the mean over their answers, with 95% intervals over prompts.</p>',
        "<h2>What was evaluated</h2>",
        table([], list(_settings(settings)), "settings"),
        section(
            "Best of n",
            "Of n answers to a prompt, the one with the highest proxy reward. Where its gold reward falls while the "
            "proxy reward rises, the proxy is over-optimised.",
            selections,
        ),
        _selected(results.best_of_n),
        section("Single responses", "One value per response.", responses),
        _detectors(results.detectors),
        _answers(results.rows),
    ]
    write_atomically(directory / "report.html", page("Evaluation", body))


def _verdict(selections: Mapping[str, Selection]) -> Iterator[str]:
    """Yield how best-of-n changes the rewards; nothing for several proxies, which a table compares."""
    if len(selections) == 1:
        (selection,) = selections.values()
        changes = [f"the proxy reward goes from {selection.proxy[0]:.3f} to {selection.proxy[-1]:.3f}"]
        if selection.gold is not None:
            changes.append(f"the gold reward from {selection.gold[0]:.3f} to {selection.gold[-1]:.3f}")
        yield f'<p class="lead">With the best of {selection.n[-1]} answers, {", ".join(changes)}.</p>'


def _means(results: Results) -> list[list[str]]:
    return [
        [f"{MEASURES[name][0]}<small>{MEASURES[name][1]}</small>", estimate.cell()]
        for name, estimate in results.means.items()
    ]


def _settings(settings: Mapping[str, Any]) -> Iterator[list[str]]:
    sampled = settings["sampling"] | {"samples per prompt": settings["samples_per_prompt"], "seed": settings["seed"]}
    shown = {
        "Policy": settings["model"],
        "Reference": settings["reference"],
        **{_label(number, settings["proxies"]): name for number, name in enumerate(settings["proxies"], start=1)},
        "Gold reward": settings["gold"],
        "Prompts": settings["prompts"],
        "Responses": settings["responses"],
        "Sampling": ", ".join(f"{name} = {value}" for name, value in sampled.items()) if settings["prompts"] else None,
    }
    for name, value in shown.items():
        if value is not None:
            yield [name, html.escape(str(value))]


def _label(number: int, proxies: Sequence[str]) -> str:
    return "Proxy reward" if len(proxies) == 1 else f"Proxy {number}"


def _best_of_n_charts(selections: Mapping[str, Selection]) -> Iterator[Chart]:
    for reward in ("proxy", "gold"):
        series = []
        for (name, selection), color in zip(selections.items(), COLORS, strict=False):
            values, fit = getattr(selection, reward), getattr(selection, f"{reward}_fit")
            if values is not None:
                label = "estimate" if len(selections) == 1 else f"chosen by {name}"
                band = _band(fit, selection.kl, values) if fit and len(selections) > 1 else ()
                series.append(Series(label, color, selection.kl, values, band))
                if fit and len(selections) == 1:
                    kl = [d**2 for d in fit.d]
                    series.append(Series("fit", GRAY, kl, fit.curve, _band(fit, kl, fit.curve)))
        if series:
            yield Lines(f"{reward.capitalize()} reward of best-of-n", _FITTED, series, _KL, f"{reward} reward")


def _band(fit: GaoFit, kl: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return how far the fit's band reaches below and above the values drawn at these KL divergences."""
    low, high = (np.interp(np.sqrt(kl), fit.d, edge) for edge in (fit.low, fit.high))
    return (values - low).tolist(), (high - values).tolist()


def _selected(selections: Mapping[str, Selection]) -> str:
    rows = []
    for name, selection in selections.items():
        for reward in ("proxy", "gold"):
            values, fit = getattr(selection, reward), getattr(selection, f"{reward}_fit")
            if values is not None:
                fitted = ["", ""]
                if fit:
                    fitted = [Estimate(fit.a, *fit.a_interval).cell(), Estimate(fit.b, *fit.b_interval).cell()]
                chosen = f"{html.escape(name)}<small>{reward} reward</small>"
                rows.append([chosen, f"{values[-1]:.3f}<small>{values[0]:.3f} of all</small>", *fitted])
    if not rows:
        return ""
    largest = next(iter(selections.values())).n[-1]
    text = "Mean of the best answer and of all, and the fits with 95% bootstrap intervals: a larger b turns earlier."
    return f'<p class="soft">{text}</p>\n{table(["Chosen by", f"Best of {largest}", "a", "b"], rows, "fits")}'


def _response_charts(rows: Sequence[Row]) -> Iterator[Chart]:
    if "proxy_reward" in rows[0] and "gold_reward" in rows[0]:
        x, y = ([row[name] for row in rows] for name in ("proxy_reward", "gold_reward"))
        cloud = [Series("responses", _GOLD, x, y, notes=[row["prompt"][:80] for row in rows])]
        text = "One point per response; the ring marks the mean."
        yield Scatter("Proxy against gold", text, cloud, "proxy reward", "gold reward")
    for measure, (unit, reference) in _HISTOGRAMS.items():
        if measure in rows[0]:
            series = [Series("policy", _POLICY, [], [row[measure] for row in rows])]
            if reference in rows[0]:
                series.insert(0, Series("reference", _REFERENCE, [], [row[reference] for row in rows]))
            yield Histogram(MEASURES[measure][0], "Dashed lines are means.", series, unit)


def _detectors(detectors: Sequence[Detector]) -> str:
    if not detectors:
        return ""
    text = "Their proxy reward is above the mean of all responses, and their gold reward below it."
    heading = "<h2>Which sign finds responses of high proxy and low gold reward?</h2>"
    return f'{heading}\n<p class="soft">{text}</p>\n{detectors_table(detectors)}'


def _answers(rows: Sequence[Row]) -> str:
    """Return, for the first prompts, the answers of the highest proxy reward and of the highest gold reward."""
    cards = []
    for index in range(min(_SHOWN, rows[-1]["index"] + 1)):
        answers = [row for row in rows if row["index"] == index]
        chosen = [(_POLICY, "", answers[0])]
        if len(answers) > 1 and "proxy_reward" in answers[0]:
            chosen = [(_POLICY, f"Highest proxy reward of {len(answers)}: ", _best(answers, "proxy_reward"))]
            if "gold_reward" in answers[0]:
                chosen.append((_GOLD, f"Highest gold reward of {len(answers)}: ", _best(answers, "gold_reward")))
        shown = [(color, label + _facts(row), row["response"]) for color, label, row in chosen]
        cards.append(sample_card(answers[0]["prompt"], shown))
    return "<h2>Answers</h2>\n<p class='soft'>To the first prompts.</p>\n" + "\n".join(cards)


def _best(answers: Sequence[Row], reward: str) -> Row:
    return max(answers, key=lambda row: float(row[reward]))


def _facts(row: Row) -> str:
    measures = {"proxy": "proxy_reward", "gold": "gold_reward", "energy loss": "energy_loss", "KL": "kl"}
    facts = [f"{label} {row[name]:.3f}" for label, name in measures.items() if name in row]
    facts.append(f"{row['response_length']} tokens")
    if "finished" in row:
        facts.append("finished" if row["finished"] else "cut off")
    return ", ".join(facts)
