"""The report of `nemo-eppo detect`: page, picture and numbers of the signs of reward hacking in a run."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_eppo.evaluation.detection import COMBINED, ENERGY_AND_KL, detectors_table
from nemo_eppo.evaluation.run_detection import CHANCE, MONITOR, NO_WARNING, PATIENCE, RunDetection
from nemo_eppo.files import write_atomically, write_json
from nemo_eppo.observability.charts import COLORS, GRAY, Lines, Series
from nemo_eppo.observability.metrics import FILE_NAME, read_metrics
from nemo_eppo.observability.pictures import write_picture
from nemo_eppo.observability.report_page import page, section
from nemo_eppo.observability.report_tables import alarms_table, read_config, table

_STEP = "PPO step"
_PROXY, _HACKED, _GOLD = COLORS[0], COLORS[1], COLORS[3]


def write_detection(detection: RunDetection, output: Path) -> None:
    """Write report.html, detection.png and report.json into the directory `output`."""
    run, steps = detection.config.run, detection.steps
    hacked = detection.curve(detection.hacked.astype(np.float64))
    rewards = [
        Series("proxy reward", _PROXY, steps, detection.curve(detection.proxy).tolist()),
        Series("gold reward", _GOLD, steps, detection.gold_curve.tolist()),
    ]
    shares = [Series("hacked responses", GRAY, steps, hacked.tolist())]
    colors = [color for color in COLORS if color not in (_PROXY, _GOLD)]
    for color, (sign, alarm) in zip(colors, detection.alarms.items(), strict=False):
        shares.append(Series(sign, color, steps, alarm.shares.tolist()))
    output.mkdir(parents=True, exist_ok=True)
    text = "Running means of the shares of a step's responses."
    charts = [
        Lines("Proxy and gold reward", "Running means over a tenth of the steps.", rewards, _STEP, "reward"),
        Lines("Hacked responses, and those that reach a threshold", text, shares, _STEP, "share of responses"),
    ]
    write_picture(output / "detection.png", charts)
    write_json(output / "report.json", detection.as_dict())
    curves = read_metrics(run / FILE_NAME) if (run / FILE_NAME).exists() else {}
    config = read_config(run / "config.yaml")[0] if (run / "config.yaml").exists() else {}
    run_alarms = alarms_table(curves, config)
    body = [
        f"<h1>Signs of reward hacking in {html.escape(str(run))}</h1>",
        f'<p class="soft">{len(steps):,} steps, {len(detection.hacked):,} responses, of which '
        f"{detection.hacked.mean():.1%} are hacked: gold reward below {detection.sft_gold:.3g} and proxy reward above "
        f"{detection.sft_proxy:.3g}, the SFT model's means in {detection.baseline}.</p>",
        f'<p class="lead">{verdict(detection)}</p>',
        section(
            "Over the course of training",
            f"The first {detection.config.calm_steps} steps set each sign's threshold: the lowest value that at most "
            f"{detection.config.false_alarms:g} of 1,000 of their responses reach, or the highest if more have it.",
            charts,
        ),
        "<h2>When would an alarm have come?</h2>",
        table(["Sign", "First alarm", "Lead", "Hacked found", "AUROC in a step"], _alarm_rows(detection), "alarms"),
        f'<p class="soft">An alarm needs {PATIENCE} steps in a row in which more responses reach the threshold than in '
        f"a step like the first ones, but for a chance of {CHANCE:g}. Lead: steps from the alarm to the peak of the "
        "gold reward; negative if it came later. Found: share of the hacked responses that reach the threshold. AUROC "
        "in a step: among responses of the same step, so that a rise over time does not count, with a 95% interval "
        "over steps. A sign has a lead only if that is above 0.5: any other may rise because training changes "
        "everything.</p>",
        "<h2>Which sign finds the hacked responses?</h2>",
        detectors_table(detection.detectors),
        f"<h2>Alarms of the run's own monitor</h2>\n{run_alarms}" if run_alarms else "",
    ]
    write_atomically(output / "report.html", page(f"Detection in {run.resolve().name}", body))


def verdict(detection: RunDetection) -> str:
    """Return in plain text whether the run was over-optimised, and which alarm to switch on."""
    if not detection.fell:
        steps = {sign: detection.alarms[sign].step for sign in MONITOR if sign in detection.alarms}
        raised = [f"{sign} (step {step})" for sign, step in steps.items() if step is not None]
        return (
            "The gold reward did not fall beyond noise: there was no over-optimisation to warn of. Signs that the "
            f"hacking monitor knows, and that would have raised a false alarm: {', '.join(raised) or 'none'}."
        )
    text = f"The gold reward was highest at step {detection.peak} and fell afterwards."
    areas = {detector.sign: detector.auroc.value for detector in detection.detectors}
    if not detection.reliable:
        return (
            f"{text} None of the signs that the hacking monitor knows finds hacked responses better than chance, in "
            "the whole run and among those of one step."
        )
    if detection.best is None:
        sign = detection.reliable[0]
        return (
            f"{text} Of the signs that the hacking monitor knows, the {sign} finds hacked responses best, with an "
            f"AUROC of {areas[sign]:.2f}, but none that finds them would have raised an alarm."
        )
    indicator = f"monitor.{MONITOR[detection.best]}.action"
    text += f" Switch on {indicator}: of the signs that the hacking monitor knows and that would have raised an alarm, "
    text += f"the {detection.best} finds hacked responses best, with an AUROC of {areas[detection.best]:.2f}"
    alarm = detection.alarms[detection.best]
    assert alarm.lead is not None  # `best` has one
    when = f"{abs(alarm.lead)} steps {'before' if alarm.lead > 0 else 'after'} the peak" if alarm.lead else "the peak"
    text += f"; it would have raised an alarm at step {alarm.step}, {when}."
    known = (*MONITOR, ENERGY_AND_KL, COMBINED)
    others = [sign for sign, alarm in detection.alarms.items() if alarm.finds_within_steps and sign not in known]
    if better := [sign for sign in others if areas[sign] > areas[detection.best]]:
        text += f" The {better[0]} finds them with {areas[better[0]]:.2f}, but the monitor has no indicator of it."
    return text


def _alarm_rows(detection: RunDetection) -> Sequence[Sequence[str]]:
    return [
        (
            f"{sign}<small>{NO_WARNING[sign]}</small>" if sign in NO_WARNING else sign,
            "none" if alarm.step is None else f"step {alarm.step}",
            "" if alarm.lead is None else f"{alarm.lead:+d}",
            f"{alarm.recall:.0%}",
            "" if alarm.auroc_within is None else alarm.auroc_within.cell(),
        )
        for sign, alarm in detection.alarms.items()
    ]
