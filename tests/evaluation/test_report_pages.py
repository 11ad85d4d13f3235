"""How pages of energy-report, detect, judge and the bench look in a real browser, with names and texts at length."""

from pathlib import Path

import numpy as np
from browser import assert_fits, needs_chromium
from results_page import write_results
from test_overoptimization import curves
from test_run_detection import of_run, write_run

from nemo_eppo.evaluation.alarms import Alarms
from nemo_eppo.evaluation.alarms_page import write_alarms
from nemo_eppo.evaluation.detection import KL, LENGTH
from nemo_eppo.evaluation.energies import Energies, Texts
from nemo_eppo.evaluation.energy_page import write_energy_report
from nemo_eppo.evaluation.judge_report import Judged, write_judgement
from nemo_eppo.evaluation.pairs import Pair
from nemo_eppo.evaluation.run_detection_page import write_detection
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.evaluation import DetectionConfig

LONG = "checkpoints/of_a_run_with_a_name_that_has_no_space_to_break_at/step_000100"
TEXT = f"A response with a long word, {LONG}, and many others. " * 8


@needs_chromium
def test_an_energy_report(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    before, after = draw.normal(size=(2, 60))
    layers = {preset: tuple(draw.normal(size=(2, 60, 32))) for preset in ("paper", "mlp_linears_out")}
    signs = {KL: draw.normal(size=60), LENGTH: draw.normal(size=60)}
    texts = [Texts(TEXT, TEXT, TEXT)] * 60
    energies = Energies(range(60), before, after, draw.random(60) < 0.5, layers, signs, texts)
    write_energy_report(energies, tmp_path, (f"{LONG}/sft", f"{LONG}/rlhf"))
    assert_fits(tmp_path / "report.html")


@needs_chromium
def test_a_detection_report(tmp_path: Path) -> None:
    write_detection(of_run(tmp_path / "run", falls=True, says=True), tmp_path)
    assert_fits(tmp_path / "report.html")


@needs_chromium
def test_a_detection_report_of_several_runs(tmp_path: Path) -> None:
    for number in range(6):
        of_run(tmp_path / f"{LONG}_{number}", falls=number % 2 == 0, says=number < 4)
    write_run(tmp_path / f"{LONG}_left_out", lambda _: [{"reward/proxy": 0.0, "reward/gold": 1.0}])
    runs = sorted((tmp_path / LONG).parent.iterdir())
    alarms = Alarms({str(run.relative_to(tmp_path)): DetectionConfig(run=run) for run in runs})
    assert (len(alarms.runs), len(alarms.left_out)) == (6, 1)
    write_alarms(alarms, tmp_path)
    assert_fits(tmp_path / "report.html")


@needs_chromium
def test_a_judgement(tmp_path: Path) -> None:
    samples = (Sample(prompt=f"{number} {TEXT}", response=TEXT, token_ids=(), finished=True) for number in range(6))
    pairs = [Pair(sample, sample) for sample in samples]
    details = {"shown_first": "win", "shown_second": "win", "reasons": [TEXT, TEXT]}
    judged = [
        *(Judged(pair, "win", ("win", "win"), details) for pair in pairs[:3]),
        *(Judged(pair, "tie", (), {"equal": True}) for pair in pairs[3:]),
    ]
    checkpoints = {f"{LONG}{number}": judged for number in range(3)}
    write_judgement(tmp_path, checkpoints, {"judge": "endpoint", "question": TEXT}, Path(LONG))
    assert_fits(tmp_path / "report.html")


@needs_chromium
def test_the_results_of_a_bench(tmp_path: Path) -> None:
    names = ("ppo", "eppo", *(f"eppo_reinforce_plus_plus_{number}" for number in range(12)))
    runs = {
        name: {seed: curves([0.0, 1.0, 0.5 + place / 100 + seed / 10]) for seed in (1, 2, 3)}
        for place, name in enumerate(names)
    }
    write_results(tmp_path, runs, {"size": "0.2M"}, {})
    assert_fits(tmp_path / "report.html")
