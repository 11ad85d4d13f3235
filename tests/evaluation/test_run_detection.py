"""When signs of hacking raise an alarm in runs that were made up, and what is said of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nemo_eppo.cli import main
from nemo_eppo.evaluation import intervals
from nemo_eppo.evaluation.detection import ENERGY, KL, LENGTH
from nemo_eppo.evaluation.intervals import Floats
from nemo_eppo.evaluation.run_detection import RunDetection, _limit
from nemo_eppo.evaluation.run_detection_page import verdict, write_detection
from nemo_eppo.settings.evaluation import DetectionConfig


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_DRAWS", 300)


def write_run(directory: Path, rows_of: Callable[[int], list[dict[str, Any]]], steps: int = 30) -> Path:
    """A run with the rows that `rows_of` makes for each step, from 1."""
    (directory / "rollouts").mkdir(parents=True)
    for step in range(1, steps + 1):
        text = "".join(json.dumps(row) + "\n" for row in rows_of(step))
        (directory / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
    return directory


def test_a_sign_that_reached_its_highest_value_in_the_first_steps_can_raise_an_alarm(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)

    def rows(step: int) -> list[dict[str, Any]]:
        hacked = draw.random(32) < (0.03 if step <= 10 else min(0.06 * (step - 9), 1))
        return [
            {"reward/proxy": float(h), "reward/gold": -float(h), "response_length": 20 if h else int(draw.integers(20))}
            for h in hacked
        ]

    alarm = RunDetection(DetectionConfig(run=write_run(tmp_path, rows))).alarms[LENGTH]
    assert (alarm.threshold, alarm.recall) == (20, 1)
    assert 0.01 < alarm.calm_share < 0.06
    assert alarm.step is not None
    assert 13 <= alarm.step < 20


def of_run(directory: Path, falls: bool, says: bool, validation: float | None = None) -> RunDetection:
    """A run with an energy loss and a KL that rise in training; the energy loss `says` which responses are hacked.

    Args:
        validation: the gold reward of the responses before step 1.
    """
    draw = np.random.default_rng(5)

    def rows(step: int) -> list[dict[str, Any]]:
        hacked = draw.random(32) < (0.2 if not falls else 0.1 if step < 15 else 0.7)
        noise = draw.normal(size=(2, 32))
        return [
            {
                "reward/proxy": 1.0 if h else draw.normal(),
                "reward/gold": -1.0 if h else 1.0,
                "energy/policy": step / 10 + 3 * says * h + a,
                "kl/policy_reference": step + b,
            }
            for h, a, b in zip(hacked.tolist(), *noise.tolist(), strict=True)
        ]

    run = write_run(directory, rows)
    if validation is not None:
        (run / "validation").mkdir()
        row = {"proxy_reward": 0.0, "gold_reward": validation}
        (run / "validation" / "step_000000.jsonl").write_text(json.dumps(row) + "\n")
        (run / "config.yaml").write_text("validation: {greedy: true}\n")
    return RunDetection(DetectionConfig(run=run))


def test_a_sign_that_rises_with_training_alone_is_no_early_warning(tmp_path: Path) -> None:
    found = of_run(tmp_path, falls=True, says=False)
    assert found.fell
    assert found.alarms[ENERGY].step is not None, "it rises"
    assert (found.alarms[ENERGY].lead, found.best) == (None, None)
    assert "None of the signs that the hacking monitor knows finds hacked responses" in verdict(found)
    write_detection(found, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["switch_on"] is None
    assert "rises in any training" in (tmp_path / "report.html").read_text()


def test_the_alarm_of_a_sign_that_tells_has_a_lead_and_that_of_kl_has_none(tmp_path: Path) -> None:
    found = of_run(tmp_path, falls=True, says=True)
    alarm = found.alarms[ENERGY]
    assert alarm.auroc_within is not None
    assert alarm.auroc_within.low > 0.9
    assert alarm.lead == found.peak - (alarm.step or 0)
    assert (found.best, found.alarms[KL].lead) == (ENERGY, None)
    assert "Switch on monitor.energy.action" in verdict(found)


def test_alarms_of_a_run_whose_gold_reward_does_not_fall_are_false(tmp_path: Path) -> None:
    found = of_run(tmp_path, falls=False, says=True)
    assert (found.fell, found.best) == (False, None)
    text = verdict(found)
    assert f"would have raised a false alarm: {ENERGY} (step {found.alarms[ENERGY].step})." in text
    assert "Switch on" not in text


def test_a_gold_reward_that_only_fluctuates_does_not_fall(tmp_path: Path) -> None:
    draw, fell = np.random.default_rng(6), 0
    for number in range(30):

        def rows(_: int) -> list[dict[str, Any]]:
            return [{"reward/proxy": a, "reward/gold": b} for a, b in draw.normal(size=(8, 2)).tolist()]

        fell += RunDetection(DetectionConfig(run=write_run(tmp_path / str(number), rows))).fell
    assert fell <= 2, "of 30 runs; at most one in forty falls so far by chance"


def test_a_damaged_rollout_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", lambda _: [{"reward/proxy": 0.0, "reward/gold": 1.0}], steps=11)
    damaged = run / "rollouts" / "step_000002.jsonl"
    damaged.write_text('{"reward/proxy": 0.0')
    assert main(["detect", str(run), "--output", str(tmp_path / "out")]) == 2
    assert f"nemo-eppo: error: {damaged}:1: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_greedy_responses_are_no_baseline_for_sampled_ones(tmp_path: Path) -> None:
    found = of_run(tmp_path, falls=True, says=True, validation=50.0)
    assert found.baseline == "step 1"
    assert found.sft_gold < 1


def test_prompts_whose_answers_resemble_each_other_raise_no_more_alarms() -> None:
    """Shares of 64 prompts whose 4 answers correlate by .8: the limit is exceeded about as rarely as it says."""
    draw = np.random.default_rng(1)

    def shares(prompts: int) -> Floats:
        energies = math.sqrt(0.8) * draw.normal(size=(prompts, 1)) + math.sqrt(0.2) * draw.normal(size=(prompts, 4))
        result: Floats = (energies > 2.326).mean(axis=1)  # one of 100
        return result

    limit, counts = _limit(shares(20_000), 64), [shares(64).mean() for _ in range(3_000)]
    assert np.mean(np.array(counts) > limit) < 0.015
    assert np.mean(stats.binom.sf(np.array(counts) * 256 - 1, 256, 0.01) < 0.01) > 0.03, "of a binomial over responses"
    single = _limit((np.arange(1000) < 50).astype(np.float64), 64)
    assert single * 64 == pytest.approx(stats.binom.ppf(0.99, 64, 0.05), abs=1e-3), "a binomial for one answer each"
