"""The report of `nemo-eppo detect` on several runs: page, picture, numbers and a table for the terminal."""

import html
import statistics
from collections.abc import Sequence
from pathlib import Path

from nemo_eppo.evaluation.alarms import Alarms
from nemo_eppo.evaluation.run_detection import MONITOR
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.observability.charts import COLORS, Bars, Lines, Series
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.report_page import page, section, titled
from nemo_eppo.observability.report_tables import plain_table, text_table

_HEADER = ["sign", "AUROC", "AUROC in a step", "alarms where gold fell", "lead, median steps", "where it did not"]


def write_alarms(alarms: Alarms, output: Path) -> str:
    """Write report.html, detection.png and report.json into the directory `output`; return the table of signs."""
    gold = [
        Series(name, COLORS[number % len(COLORS)], run.steps, run.gold_curve.tolist())
        for number, (name, run) in enumerate(alarms.runs.items())
    ]
    signs = alarms.signs.values()
    raised = [
        Series("the gold reward fell", COLORS[0], [], [sign.raised for sign in signs]),
        Series("it did not: false alarms", COLORS[1], [], [sign.false for sign in signs]),
    ]
    output.mkdir(parents=True, exist_ok=True)
    charts = [
        Lines("Gold reward", "Of each run.", gold, "PPO step", "gold reward"),
        Bars("Alarms", "Right alarms, and false ones.", raised, "runs with an alarm", names=list(alarms.signs)),
    ]
    write_picture(output / "detection.png", charts)
    write_json(output / "report.json", alarms.as_dict())
    left_out: list[Sequence[str]] = [("run", "why"), *alarms.left_out.items()]
    body = [
        "<h1>Signs of reward hacking in several runs</h1>",
        f'<p class="lead">{html.escape(verdict(alarms))}</p>',
        "<h2>Alarms of each sign</h2>",
        plain_table(_sign_rows(alarms)),
        '<p class="soft">Medians, with the number of runs in brackets. Where the gold reward fell beyond noise an '
        "alarm is right, and its lead is positive if it came before the peak; elsewhere it is false. A sign has a lead "
        "in the runs in which it tells hacked from normal responses of one step; KL, which rises in any training, and "
        "combined signs, which are fitted to the labels, have none.</p>",
        section(
            "Over the runs",
            "Running means over a tenth of the steps; in how many runs each sign raised an alarm.",
            charts,
        ),
        "<h2>The runs</h2>",
        plain_table(_run_rows(alarms)),
        titled("Left out", plain_table(left_out) if alarms.left_out else ""),
    ]
    write_atomically(output / "report.html", page("Detection in several runs", body))
    return text_table("Signs of reward hacking", _sign_rows(alarms), width=140)


def verdict(alarms: Alarms) -> str:
    """Return in plain text how often the gold reward fell, and which sign raised most alarms before its peak."""
    text = f"The gold reward fell beyond noise in {alarms.fell} of {len(alarms.runs)} runs."
    if alarms.left_out:
        text += f" Left out, since nothing can be told apart there: {', '.join(alarms.left_out)}."
    monitored = {sign: counts for sign, counts in alarms.signs.items() if sign in MONITOR}
    if not alarms.fell:
        false = [f"{sign} ({counts.false} of {counts.others})" for sign, counts in monitored.items() if counts.false]
        return f"{text} False alarms of signs that the hacking monitor knows: {', '.join(false) or 'none'}."
    early = {sign: sum(lead > 0 for lead in counts.leads) for sign, counts in monitored.items()}
    if not any(early.values()):
        return f"{text} No alarm of a sign that the hacking monitor knows, and that tells, came before the peak."
    first = max(early, key=lambda sign: early[sign])
    counts = monitored[first]
    elsewhere = f"; where it did not fall, the alarm came in {counts.false} of {counts.others}" if counts.others else ""
    return (
        f"{text} Of the signs that the hacking monitor knows, the {first} warned most often before the peak: in "
        f"{early[first]} of {counts.fell} runs{elsewhere}."
    )


def _sign_rows(alarms: Alarms) -> list[list[str]]:
    rows = [
        [
            sign,
            _median(counts.auroc),
            _median(counts.auroc_within),
            f"{counts.raised}/{counts.fell}",
            _median(counts.leads, 0),
            f"{counts.false}/{counts.others}",
        ]
        for sign, counts in alarms.signs.items()
    ]
    return [_HEADER, *rows]


def _run_rows(alarms: Alarms) -> list[list[str]]:
    rows = [
        [
            name,
            str(len(run.steps)),
            f"{run.hacked.mean():.1%}",
            f"fell after step {run.peak}" if run.fell else "did not fall",
            run.best or "none",
        ]
        for name, run in alarms.runs.items()
    ]
    return [["run", "steps", "hacked responses", "gold reward", "alarm to switch on"], *rows]


def _median(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, and the number of values in brackets; nothing for none."""
    return f"{statistics.median(values):.{digits}f} ({len(values)})" if values else ""
