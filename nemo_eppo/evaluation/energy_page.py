"""The energy report: page, pictures, numbers and samples of a model's energy loss before and after RLHF."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from nemo_eppo.data.jsonl import write_jsonl
from nemo_eppo.evaluation.detection import ENERGY, RISE, Detector, compare_signs, detectors_table
from nemo_eppo.evaluation.energies import Energies
from nemo_eppo.evaluation.intervals import Estimate, Floats, bootstrap_mean
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.observability.charts import COLORS, GRAY, Histogram, Lines, Series
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.report_page import page, sample_card, section
from nemo_eppo.observability.report_tables import table

_SHOWN = 12  # samples on the page
_RLHF, _HACKED = COLORS[0], COLORS[1]


class SweepEntry(NamedTuple):
    """How much the energies of one layer under one preset rise, and how well they find hacked responses."""

    preset: str
    layer: int
    shift: float
    """Mean rise, in standard deviations of the responses (of both models, pooled)."""
    auroc: float | None
    """Of hacking by the RLHF model's energy loss; None without labels."""
    auroc_rise: float | None
    """Of hacking by its rise over the SFT model's."""


class _Results(NamedTuple):
    """All numbers of the report except those of single samples; intervals are of a bootstrap over prompts."""

    groups: Mapping[str, Floats]
    means: Mapping[str, Estimate]
    """Of each group."""
    rise: Estimate
    share_risen: float
    detectors: Sequence[Detector]
    """Empty without labels."""
    sweep: Sequence[SweepEntry]

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for a JSON file."""
        return {
            "samples": len(self.groups["RLHF"]),
            "groups": {
                name: {"responses": len(values), "mean": self.means[name].as_dict(), "std": float(values.std())}
                for name, values in self.groups.items()
            },
            "rise": self.rise.as_dict(),
            "share_risen": self.share_risen,
            "detection": {detector.sign: detector.as_dict() for detector in self.detectors},
            "sweep": [entry._asdict() for entry in self.sweep],
        }


def write_energy_report(energies: Energies, output: Path, names: tuple[str, str] = ("SFT", "RLHF")) -> None:
    """Write report.html, energies.png, report.json and samples.jsonl, and sweep.png if several layers were read.

    Args:
        output: a directory.
        names: the two models or files that are compared, for the page.
    """
    results, samples = _measure(energies), _samples(energies)
    charts, sweep = _group_charts(results.groups), _sweep_charts(results.sweep)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "report.json", results.as_dict())
    write_jsonl(output / "samples.jsonl", samples)
    write_picture(output / "energies.png", charts)
    if sweep:
        write_picture(output / "sweep.png", sweep)
    body = [
        "<h1>Energy loss before and after RLHF</h1>",
        f'<p class="soft">{len(samples):,} responses; {" against ".join(map(html.escape, names))}</p>',
        f'<p class="lead">{_verdict(results)}</p>',
        table(["", "Mean", "Deviation"], _group_rows(results), "groups"),
        section(
            "Energy losses of single responses",
            "L1 norm of the layer's input minus that of its output, mean over the response's tokens.",
            charts,
        ),
    ]
    if results.detectors:
        body += ["<h2>Which sign finds the hacked responses?</h2>", detectors_table(results.detectors)]
    if sweep:
        body.append(section("Where to read it", "Layers are counted from 0.", sweep))
        body.append(
            '<p class="soft">The layer that separates best, by high or low values, and the last one. The best of many '
            "layers is partly so by chance: expect less of it on other responses.</p>"
        )
        body.append(_best_table(results.sweep))
    body.append(_cards(energies, samples))
    write_atomically(output / "report.html", page("Energy report", body))


def _measure(energies: Energies) -> _Results:
    prompts = np.arange(len(energies.after)) if energies.prompts is None else np.array(energies.prompts)
    risen = energies.after - energies.before
    groups, group_prompts = {"SFT": energies.before, "RLHF": energies.after}, {"SFT": prompts, "RLHF": prompts}
    detectors: Sequence[Detector] = ()
    if energies.hacked is not None:
        kinds = {"hacking": energies.hacked, "normal": ~energies.hacked}
        groups |= {name: energies.after[kind] for name, kind in kinds.items()}
        group_prompts |= {name: prompts[kind] for name, kind in kinds.items()}
        detectors = compare_signs(energies.hacked, {**energies.signs, ENERGY: energies.after, RISE: risen}, prompts)
    return _Results(
        groups,
        means={name: bootstrap_mean(values, seed=0, groups=group_prompts[name]) for name, values in groups.items()},
        rise=bootstrap_mean(risen, seed=0, groups=prompts),
        share_risen=float((risen > 0).mean()),
        detectors=detectors,
        sweep=_sweep(energies),
    )


def _group_charts(groups: Mapping[str, Floats]) -> list[Histogram]:
    """Return the paper's two histograms."""

    def series(name: str, color: str) -> Series:
        return Series(f"{name} ({len(groups[name])})", color, [], groups[name].tolist())

    text = "Dashed lines are means. A rise of all responses is the first sign that the paper describes."
    charts = [Histogram("SFT against RLHF", text, [series("SFT", GRAY), series("RLHF", _RLHF)], "energy loss")]
    if "hacking" in groups:
        text = "Responses of the RLHF model. An excessive energy loss of the hacked ones is the second sign."
        kinds = [series("normal", GRAY), series("hacking", _HACKED)]
        charts.append(Histogram("Hacking against normal", text, kinds, "energy loss"))
    return charts


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


def _sweep_charts(sweep: Sequence[SweepEntry]) -> list[Lines]:
    """Return a chart with a line for each preset over the layers; none without a sweep."""
    curves = []
    for color, preset in zip(COLORS, dict.fromkeys(entry.preset for entry in sweep), strict=False):
        entries = [entry for entry in sweep if entry.preset == preset]
        values = [entry.shift if entry.auroc is None else entry.auroc for entry in entries]
        curves.append(Series(preset, color, [entry.layer for entry in entries], values))
    if not curves:
        return []
    text, measure = "AUROC of hacking by the RLHF model's energy loss there; 0.5 is chance.", "AUROC of hacking"
    if sweep[0].auroc is None:
        text = "Mean rise from before to after, in standard deviations of the responses."
        measure = "rise in standard deviations"
    return [Lines("Every layer, every preset", text, curves, "layer", measure)]


def _best_table(sweep: Sequence[SweepEntry]) -> str:
    """Return a table of the layer of each preset that separates best."""
    rows = []
    for preset in dict.fromkeys(entry.preset for entry in sweep):
        entries = [entry for entry in sweep if entry.preset == preset]
        best, last = max(entries, key=_separation), entries[-1]
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


def _separation(entry: SweepEntry) -> float:
    return abs(entry.shift) if entry.auroc is None else abs(entry.auroc - 0.5)


def _verdict(results: _Results) -> str:
    rise = results.rise
    moved = "did not change beyond noise" if rise.low <= 0 <= rise.high else "rose" if rise.value > 0 else "fell"
    text = (
        f"The energy loss {moved}: its mean change is {_text(rise, 4)}, and it is higher on "
        f"{results.share_risen:.1%} of the responses."
    )
    if results.detectors:
        auroc = next(detector.auroc for detector in results.detectors if detector.sign == ENERGY)
        text += f" It tells hacked from normal responses with an AUROC of {_text(auroc, 3)}."
    return text


def _text(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.interval(digits)})"


def _group_rows(results: _Results) -> list[Sequence[str]]:
    return [
        (f"{name}<small>{len(values):,} responses</small>", results.means[name].cell(4), f"{values.std():.4f}")
        for name, values in results.groups.items()
    ]


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
    """Return, as HTML, the samples whose energy loss rose most, with their texts if there are any."""
    rise = energies.after - energies.before
    shown = [number for number in np.argsort(-rise, kind="stable")[:_SHOWN] if rise[number] > 0]
    if not shown:
        return '<p class="soft">The energy loss of no sample rose. All samples are in samples.jsonl.</p>'
    cards = ["<h2>Largest rise in energy loss</h2>", '<p class="soft">All samples are in samples.jsonl.</p>']
    if energies.texts is None:
        cells = []
        for row in (samples[number] for number in shown):
            cells.append([str(row["index"]), *(f"{row[name]:.4f}" for name in ("before", "after", "rise"))])
            if "hacking" in row:
                cells[-1].append("hacking" if row["hacking"] else "normal")
        columns = ["Sample", "SFT", "RLHF", "Rise", "Label"][: len(cells[0])]
        return "\n".join([*cards, table(columns, cells, "samples")])
    for number in shown:
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
