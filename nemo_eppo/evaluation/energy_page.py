"""The energy report: page, pictures, numbers and samples of what RLHF did to the energy loss of a model."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from nemo_eppo.data.jsonl import write_jsonl
from nemo_eppo.evaluation.detection import ENERGY, RISE, Detector, compare_signs, detectors_table
from nemo_eppo.evaluation.energies import Energies
from nemo_eppo.evaluation.statistics import Estimate, Floats, bootstrap_mean
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.observability.charts import COLORS, GRAY, Series, histogram_chart, line_chart
from nemo_eppo.observability.pictures import histogram, lines, write_picture
from nemo_eppo.observability.report_page import figure, page, sample_card, section
from nemo_eppo.observability.report_tables import table

_SHOWN = 12  # samples on the page
_RLHF, _HACKED = COLORS[0], COLORS[1]


class SweepEntry(NamedTuple):
    """What the energies of one layer under one preset say."""

    preset: str
    layer: int
    shift: float
    """Mean rise, in standard deviations of the responses (of both models, pooled)."""
    auroc: float | None
    """Of hacking by the RLHF model's energy loss; None without labels."""
    auroc_rise: float | None
    """Of hacking by its rise over the SFT model's."""


def write_energy_report(energies: Energies, output: Path, names: tuple[str, str] = ("SFT", "RLHF")) -> None:
    """Write report.html, energies.png, report.json and samples.jsonl, and sweep.png if several layers were read.

    Intervals are of a bootstrap over prompts.

    Args:
        output: a directory.
        names: what the page says was compared, before and after.
    """
    prompts = np.arange(len(energies.after)) if energies.prompts is None else np.array(energies.prompts)
    rise = bootstrap_mean(energies.after - energies.before, seed=0, groups=prompts)
    groups, samples = _groups(energies), _samples(energies)
    of_kind = {"hacking": energies.hacked, "normal": ~energies.hacked} if energies.hacked is not None else {}
    means = {
        name: bootstrap_mean(values, seed=0, groups=prompts[of_kind.get(name, slice(None))])
        for name, values in groups.items()
    }
    detectors: Sequence[Detector] = ()
    if energies.hacked is not None:
        own = {ENERGY: energies.after, RISE: energies.after - energies.before}
        detectors = compare_signs(energies.hacked, {**energies.signs, **own}, prompts)
    sweep = _sweep(energies)
    share_risen = float((energies.after > energies.before).mean())
    report = {
        "samples": len(energies.after),
        "groups": {name: _summary(values, means[name]) for name, values in groups.items()},
        "rise": rise.as_dict(),
        "share_risen": share_risen,
        "detection": {detector.sign: detector.as_dict() for detector in detectors},
        "sweep": [entry._asdict() for entry in sweep],
    }
    output.mkdir(parents=True, exist_ok=True)
    shown = list(_panels(groups))
    write_picture(output / "energies.png", [histogram(series, "energy loss", title) for title, _, series in shown])
    curves, measure = _curves(sweep)
    if curves:
        write_picture(output / "sweep.png", [lines(curves, "layer", measure, "Every layer, every preset")])
    write_jsonl(output / "samples.jsonl", samples)
    write_json(output / "report.json", report)
    body = [
        "<h1>Energy loss before and after RLHF</h1>",
        f'<p class="soft">{len(energies.after):,} responses; {" against ".join(map(html.escape, names))}</p>',
        f'<p class="lead">{_verdict(share_risen, rise, detectors)}</p>',
        table(["", "Mean", "Deviation"], _group_rows(groups, means), "groups"),
        section(
            "Energy losses of single responses",
            "What the layer takes away from the L1 norm of its input, mean over the response's tokens.",
            [figure(title, text, histogram_chart(series, "energy loss")) for title, text, series in shown],
        ),
    ]
    if detectors:
        body += ["<h2>Which sign finds the hacked responses?</h2>", detectors_table(detectors)]
    if curves:
        text = (
            "AUROC of hacking by the RLHF model's energy loss there; 0.5 is chance."
            if energies.hacked is not None
            else "Mean rise from before to after, in standard deviations of the responses."
        )
        chart = figure("Every layer, every preset", text, line_chart(curves, "layer", measure))
        body.append(section("Where to read it", "Layers are counted from 0.", [chart]))
        body.append(
            '<p class="soft">The layer that tells most, by high or low values, and the last one. The best of many '
            "layers is so by chance, too: expect less of it on other responses.</p>"
        )
        body.append(_best_table(sweep))
    body.append(_cards(energies, samples))
    write_atomically(output / "report.html", page("Energy report", body))


def _groups(energies: Energies) -> dict[str, Floats]:
    groups = {"SFT": energies.before, "RLHF": energies.after}
    if energies.hacked is not None:
        groups |= {"hacking": energies.after[energies.hacked], "normal": energies.after[~energies.hacked]}
    return groups


def _panels(groups: Mapping[str, Floats]) -> Sequence[tuple[str, str, list[Series]]]:
    """Title, caption and series of the paper's two histograms."""

    def series(name: str, color: str) -> Series:
        return Series(f"{name} ({len(groups[name])})", color, [], groups[name].tolist())

    found = [
        (
            "SFT against RLHF",
            "Dashed lines are means. A rise of all responses is the first sign that the paper describes.",
            [series("SFT", GRAY), series("RLHF", _RLHF)],
        )
    ]
    if "hacking" in groups:
        text = "Responses of the RLHF model. An excessive energy loss of the hacked ones is the second sign."
        found.append(("Hacking against normal", text, [series("normal", GRAY), series("hacking", _HACKED)]))
    return found


def _sweep(energies: Energies) -> list[SweepEntry]:
    entries = []
    for preset, (before, after) in energies.sweep.items():
        spread = np.sqrt((before.var(axis=0, ddof=1) + after.var(axis=0, ddof=1)) / 2)
        for layer, shift in enumerate((after - before).mean(axis=0) / np.maximum(spread, 1e-12)):
            areas: list[float | None] = [None, None]
            if energies.hacked is not None:
                columns = after[:, layer], after[:, layer] - before[:, layer]
                areas = [float(roc_auc_score(energies.hacked, column)) for column in columns]
            entries.append(SweepEntry(preset, layer, float(shift), *areas))
    return entries


def _curves(sweep: Sequence[SweepEntry]) -> tuple[list[Series], str]:
    """One line for each preset over the layers, and what it shows."""
    curves = []
    for color, preset in zip(COLORS, dict.fromkeys(entry.preset for entry in sweep), strict=False):
        entries = [entry for entry in sweep if entry.preset == preset]
        values = [entry.shift if entry.auroc is None else entry.auroc for entry in entries]
        curves.append(Series(preset, color, [entry.layer for entry in entries], values))
    labelled = bool(sweep) and sweep[0].auroc is not None
    return curves, "AUROC of hacking" if labelled else "rise in standard deviations"


def _best_table(sweep: Sequence[SweepEntry]) -> str:
    """The layer of each preset that tells most."""
    rows = []
    for preset in dict.fromkeys(entry.preset for entry in sweep):
        entries = [entry for entry in sweep if entry.preset == preset]
        best, last = max(entries, key=_tells), entries[-1]
        cells = [preset, str(best.layer), f"{best.shift:+.2f}", f"{last.shift:+.2f}"]
        if best.auroc is not None and last.auroc is not None:
            cells[3:3] = [f"{best.auroc:.3f}"]
            cells.append(f"{last.auroc:.3f}")
        rows.append(cells)
    head = ["Preset", "Best layer", "Rise (sd)", "Rise of the last layer"]
    if len(rows[0]) > 4:
        head[3:3] = ["AUROC"]
        head.append("AUROC of the last layer")
    return table(head, rows, "sweep")


def _tells(entry: SweepEntry) -> float:
    return abs(entry.shift) if entry.auroc is None else abs(entry.auroc - 0.5)


def _verdict(share_risen: float, rise: Estimate, detectors: Sequence[Detector]) -> str:
    moved = "did not change beyond noise" if rise.low <= 0 <= rise.high else "rose" if rise.value > 0 else "fell"
    text = (
        f"The energy loss {moved}: its mean change is {_text(rise, 4)}, and it is higher on {share_risen:.1%} of the "
        "responses."
    )
    if detectors:
        auroc = next(detector.auroc for detector in detectors if detector.sign == ENERGY)
        text += f" It tells hacked from normal responses with an AUROC of {_text(auroc, 3)}."
    return text


def _text(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.interval(digits)})"


def _summary(values: Floats, mean: Estimate) -> dict[str, Any]:
    return {"responses": len(values), "mean": mean.as_dict(), "std": float(values.std())}


def _group_rows(groups: Mapping[str, Floats], means: Mapping[str, Estimate]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for name, values in groups.items():
        label = f"{name}<small>{len(values):,} responses</small>"
        rows.append((label, means[name].cell(4), f"{values.std():.4f}"))
    return rows


def _samples(energies: Energies) -> Sequence[dict[str, Any]]:
    rows = []
    for number, index in enumerate(energies.index):
        before, after = float(energies.before[number]), float(energies.after[number])
        row = {"index": index, "before": before, "after": after, "rise": after - before}
        if energies.hacked is not None:
            row["hacking"] = bool(energies.hacked[number])
        rows.append(row | {sign: float(values[number]) for sign, values in energies.signs.items()})
    return rows


def _cards(energies: Energies, samples: Sequence[Mapping[str, Any]]) -> str:
    """The samples whose energy loss rose most, with their texts if there are any."""
    rise = energies.after - energies.before
    most = [number for number in np.argsort(-rise, kind="stable")[:_SHOWN] if rise[number] > 0]
    if not most:
        return '<p class="soft">The energy loss of no sample rose. All samples are in samples.jsonl.</p>'
    cards = ["<h2>Largest rise in energy loss</h2>", '<p class="soft">All samples are in samples.jsonl.</p>']
    if energies.texts is None:
        cells = []
        for row in (samples[number] for number in most):
            cells.append([str(row["index"]), *(f"{row[name]:.4f}" for name in ("before", "after", "rise"))])
            if "hacking" in row:
                cells[-1].append("hacking" if row["hacking"] else "normal")
        columns = ["Sample", "SFT", "RLHF", "Rise", "Label"][: len(cells[0])]
        return "\n".join([*cards, table(columns, cells, "samples")])
    for number in most:
        text, label = energies.texts[number], ""
        if energies.hacked is not None:
            label = ", hacking" if energies.hacked[number] else ", normal"
        before, after = f"{energies.before[number]:.4f}", f"{energies.after[number]:.4f}{label}"
        sample = f"Sample {energies.index[number]}, "
        responses = [(GRAY, f"{sample}SFT: {before}", text.before), (_RLHF, f"RLHF: {after}", text.after)]
        if text.before == text.after:
            responses = [(_RLHF, f"{sample}SFT: {before}, RLHF: {after}", text.after)]
        cards.append(sample_card(text.prompt, responses))
    return "\n".join(cards)
