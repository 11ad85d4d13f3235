"""How well signs tell hacked from normal responses, against scipy, scikit-learn and brute force."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Job, Models
from scipy import stats
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedGroupKFold
from small_data import read_rows

from nemo_eppo.cli import main
from nemo_eppo.evaluation import intervals
from nemo_eppo.evaluation.detection import (
    COMBINED,
    ENERGY,
    ENERGY_AND_KL,
    KL,
    LENGTH,
    MAHALANOBIS,
    RISE,
    VARIANCE,
    combine_signs,
    compare_signs,
    detectors_of_evaluation,
    signs_of_rows,
)
from nemo_eppo.evaluation.intervals import Floats, within_groups_auroc
from nemo_eppo.evaluation.run_detection import RunDetection
from nemo_eppo.settings.evaluation import DetectionConfig


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_DRAWS", 300)


@pytest.fixture
def signs() -> tuple[np.ndarray, dict[str, Floats]]:
    """Labels of 200 responses, a good, a weak and a useless sign in different units."""
    draw = np.random.default_rng(4)
    hacked = draw.random(200) < 0.25
    noise = draw.normal(size=(3, 200))
    values = [-0.6 + 0.02 * (noise[0] + 1.5 * hacked), 100 + 30 * (noise[1] + 0.7 * hacked), noise[2]]
    return hacked, dict(zip((ENERGY, LENGTH, KL), values, strict=True))


def test_an_evaluation_is_labelled_by_what_pleases_only_its_proxies() -> None:
    draw = np.random.default_rng(2)
    hacked = np.arange(60) % 3 == 0
    disagreement = np.where(hacked, 2.0, 0.1) * draw.normal(size=60)
    rows = [
        {
            "index": index,
            "proxy_reward": 1.0 if fooled else value,
            "proxy_rewards": [value + apart, value - apart],
            "gold_reward": -1.0 if fooled else value,
            "energy_loss": value + 5 * fooled,
            "response_length": 7,
        }
        for index, fooled, value, apart in zip(
            range(60), hacked.tolist(), draw.uniform(-0.3, -0.1, 60), disagreement, strict=True
        )
    ]
    found = {detector.sign: detector.auroc.value for detector in detectors_of_evaluation(rows, True)}
    assert found.keys() == {ENERGY, LENGTH, VARIANCE, COMBINED}
    assert (found[ENERGY], found[LENGTH]) == (1.0, 0.5)
    assert 0.8 < found[VARIANCE] < 1.0
    assert detectors_of_evaluation([{k: v for k, v in row.items() if k != "gold_reward"} for row in rows], True) == []
    assert VARIANCE not in {one.sign for one in detectors_of_evaluation(rows, reward_models=False)}, "of functions"
    assert detectors_of_evaluation(rows[1:3], True) == [], "none is hacked"


def test_the_combination_is_a_logistic_regression_fitted_without_the_prompts_it_predicts(
    signs: tuple[np.ndarray, dict[str, Floats]],
) -> None:
    hacked, columns = signs
    data = np.column_stack(list(columns.values()))
    expected, prompts = np.empty(len(hacked)), np.arange(200) // 4
    for seen, unseen in StratifiedGroupKFold(5, shuffle=True, random_state=3).split(data, hacked, prompts):
        assert not set(prompts[seen]) & set(prompts[unseen])
        mean, std = data[seen].mean(0), data[seen].std(0)
        x, y = (data[seen] - mean) / std, np.where(hacked[seen], 1.0, -1.0)

        def loss(w: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> float:
            return float(np.logaddexp(0, -y * (x @ w[1:] + w[0])).sum() + (w[1:] ** 2).sum() / 2)

        found = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-6}).x
        expected[unseen] = (data[unseen] - mean) / std @ found[1:] + found[0]
    np.testing.assert_allclose(combine_signs(hacked, columns, prompts, seed=3), expected, atol=2e-3)


def test_signs_are_ranked_and_combined(signs: tuple[np.ndarray, dict[str, Floats]]) -> None:
    hacked, columns = signs
    found = compare_signs(hacked, dict(reversed(columns.items())), np.arange(200))
    assert [detector.sign for detector in found] == [ENERGY, LENGTH, KL, ENERGY_AND_KL, COMBINED]
    for detector in found[:-2]:
        values = columns[detector.sign]
        assert detector.auroc.value == pytest.approx(roc_auc_score(hacked, values))
        false, true, thresholds = roc_curve(hacked, values, drop_intermediate=False)
        first = np.flatnonzero(true >= 0.9)[0]
        assert detector.threshold == thresholds[first]
        assert detector.false_alarms == pytest.approx(1000 * false[first])
    assert found[-1].auroc.value > found[0].auroc.value, "two signs say more than one"
    assert [detector.sign for detector in compare_signs(hacked, {KL: columns[KL]}, np.arange(200))] == [KL]


def test_energy_loss_and_kl_are_a_detector_of_their_own() -> None:
    """What both share hides what the energy loss says; the length says nothing."""
    draw = np.random.default_rng(7)
    hacked, shared, length = np.arange(240) % 4 == 0, 10 * draw.normal(size=240), draw.normal(size=240)
    signs = {KL: shared, LENGTH: length, ENERGY: shared + 2 * hacked + draw.normal(size=240)}
    prompts = np.arange(240)
    found = {detector.sign: detector for detector in compare_signs(hacked, signs, prompts)}
    area = roc_auc_score(hacked, combine_signs(hacked, {KL: shared, ENERGY: signs[ENERGY]}, prompts))
    assert found[ENERGY_AND_KL].auroc.value == area > 0.85
    assert max(found[sign].auroc.value for sign in signs) < 0.65
    both = compare_signs(hacked, {sign: signs[sign] for sign in (KL, ENERGY)}, prompts)
    assert [detector.sign for detector in both] == [ENERGY, KL, COMBINED], "all are these"
    others = compare_signs(hacked, {sign: signs[sign] for sign in (KL, LENGTH)}, prompts)
    assert ENERGY_AND_KL not in {detector.sign for detector in others}


def test_answers_to_one_prompt_count_as_what_they_share() -> None:
    """Labels and signs that prompts decide, but not one the other: 32 prompts x 8 answers, 20 times."""
    draw, covered, combined = np.random.default_rng(0), 0, []
    prompts = np.arange(256) // 8
    for _ in range(20):
        shared, alone = draw.normal(size=(3, 32))[:, prompts], draw.normal(size=(3, 256))
        label, first, second = shared + alone / 2
        found = compare_signs(label > 0.5, {KL: first, LENGTH: second}, prompts)
        covered += sum(one.auroc.low <= 0.5 <= one.auroc.high for one in found if one.sign != COMBINED)
        combined.append(found[-1].auroc.low > 0.5)
    assert covered >= 35, "of 40 intervals of 95%"
    assert sum(combined) <= 2, "nothing is learnt where there is nothing to learn"
    of_two_prompts = compare_signs(np.arange(256) < 16, {KL: first, LENGTH: second}, prompts)
    assert {one.sign for one in of_two_prompts} == {KL, LENGTH}, "too few to leave prompts out"


def test_auroc_within_groups_counts_pairs_of_one_group(signs: tuple[np.ndarray, dict[str, Floats]]) -> None:
    hacked, columns = signs
    groups = np.arange(200) // 20
    values = columns[LENGTH] + 1000 * groups * 0.5  # groups differ, which must not count
    wins = pairs = 0.0
    per_group = []
    for group in range(10):
        mine, labels = values[groups == group], hacked[groups == group]
        if labels.any() and not labels.all():
            wins += stats.mannwhitneyu(mine[labels], mine[~labels]).statistic
            pairs += labels.sum() * (~labels).sum()
            per_group.append(
                (stats.mannwhitneyu(mine[labels], mine[~labels]).statistic, labels.sum() * (~labels).sum())
            )
    found = within_groups_auroc(hacked, values, groups, seed=0)
    assert found is not None
    assert found.value == pytest.approx(wins / pairs)
    resampled = stats.bootstrap(
        np.array(per_group).T, lambda won, of, axis: won.sum(axis) / of.sum(axis), paired=True, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx(resampled, abs=0.01)
    assert within_groups_auroc([True, False] * 4, range(8), np.arange(8) // 2, seed=0) is None


def test_signs_are_read_from_the_columns_that_all_rows_have() -> None:
    draw = np.random.default_rng(0)
    names = ("energy/policy", "energy/reference", "kl/policy_reference", "reward/latent_distance", "reward/score_0",
             "reward/score_1", "reward/score_2")  # fmt: skip
    numbers = draw.normal(size=(30, len(names)))
    rows = [dict(zip(names, row.tolist(), strict=True)) | {"response_length": 3} for row in numbers]
    found = signs_of_rows(rows, rows[:10], reward_models=True)
    assert set(found) == {ENERGY, RISE, KL, MAHALANOBIS, LENGTH, VARIANCE}
    np.testing.assert_allclose(found[RISE], numbers[:, 0] - numbers[:, 1])
    scores = (numbers[:, 4:] - numbers[:10, 4:].mean(0)) / numbers[:10, 4:].std(0)
    np.testing.assert_allclose(found[VARIANCE], scores.var(axis=1))
    assert VARIANCE not in signs_of_rows(rows, standard=rows, reward_models=False)
    del rows[7]["kl/policy_reference"]
    assert KL not in signs_of_rows(rows, rows, reward_models=True)


STEPS, PEAK, RATE = range(1, 41), 20, 20.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose gold reward peaks at step PEAK; its energy loss rises a few steps before, its length never."""
    directory = tmp_path_factory.mktemp("run")
    draw = np.random.default_rng(2)
    for folder in ("rollouts", "validation"):
        (directory / folder).mkdir()
    validation = [{"proxy_reward": x, "gold_reward": x / 2} for x in draw.normal(size=200).tolist()]
    (directory / "validation" / "step_000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
    for step in STEPS:
        rows = []
        for _ in range(32):
            hacked = draw.random() < 0.04 * max(step - PEAK + 6, 0)
            rows.append(
                {
                    "reward/proxy": step / 20 + draw.normal() / 4 + 0.5 * hacked,
                    "reward/gold": min(step, PEAK) / PEAK - 2.5 * hacked + draw.normal() / 10,
                    "energy/policy": -0.6 + 0.02 * draw.normal() + 0.06 * hacked,
                    "response_length": int(draw.integers(5, 20)),
                }
            )
        (directory / "rollouts" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_labels_thresholds_and_lead_times_are_those_of_brute_force(run: Path) -> None:
    detection = RunDetection(DetectionConfig(run=run, calm_steps=8, false_alarms=RATE))
    rows = [row | {"step": step} for step in STEPS for row in read_rows(run / "rollouts" / f"step_{step:06d}.jsonl")]
    sft = read_rows(run / "validation" / "step_000000.jsonl")
    proxy, gold = (sum(row[name] for row in sft) / len(sft) for name in ("proxy_reward", "gold_reward"))
    hacked = [row["reward/proxy"] > proxy and row["reward/gold"] < gold for row in rows]
    assert detection.hacked.tolist() == hacked
    assert 100 < sum(hacked) < len(hacked) - 100

    # the peak and the first alarm, found by trying every step
    gold_of = {step: np.mean([row["reward/gold"] for row in rows if row["step"] == step]) for step in STEPS}
    running = {step: np.mean([gold_of[near] for near in gold_of if abs(near - step) <= 2]) for step in STEPS}
    assert detection.peak == max(running, key=lambda step: running[step])
    assert detection.fell
    calm = [row["energy/policy"] for row in rows if row["step"] <= 8]
    alarm = detection.alarms[ENERGY]
    reached = sum(energy >= alarm.threshold for energy in calm)
    assert (reached, alarm.calm_share) == (math.floor(RATE / 1000 * len(calm)), reached / len(calm))
    suspicious = {}
    for step in STEPS[8:]:
        above = sum(row["energy/policy"] >= alarm.threshold for row in rows if row["step"] == step)
        suspicious[step] = stats.binomtest(above, 32, alarm.calm_share, alternative="greater").pvalue < 0.01
    first = next(step for step in STEPS[10:] if all(suspicious[step - back] for back in range(3)))
    assert (alarm.step, alarm.lead) == (first, detection.peak - first)
    assert alarm.recall == pytest.approx(
        sum(row["energy/policy"] >= alarm.threshold for row, is_hacked in zip(rows, hacked, strict=True) if is_hacked)
        / sum(hacked)
    )
    assert detection.alarms[LENGTH].step is None
    assert detection.best == ENERGY


def test_the_report_says_which_alarm_to_switch_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["detect", str(run), "--output", str(tmp_path), "--calm-steps", "8", "--false-alarms", str(RATE)]
    assert main(command) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["switch_on"] == "monitor.energy"
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    said = f"would have raised an alarm at step {report['signs'][ENERGY]['first_alarm_step']}"
    assert said in printed
    assert said in page
    assert (tmp_path / "detection.png").stat().st_size > 10_000


def test_runs_that_cannot_be_judged_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rollouts").mkdir()
    rows = [{"reward/proxy": 1.0, "energy/policy": 0.1}] * 4
    for step in range(1, 5):
        (tmp_path / "rollouts" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for directory, calm, said in (
        (tmp_path / "nowhere", "10", "nowhere: no such directory; expected the directory of an actor's run"),
        (run, "40", "rollouts has 40 recorded steps; expected the directory of an actor's run with more than"),
        (tmp_path, "2", "step_000001.jsonl: rows without reward/proxy or reward/gold"),
        (run, "1", "calm_steps = 1"),
    ):
        assert main(["detect", str(directory), "--output", str(tmp_path / "out"), "--calm-steps", calm]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_run_of_the_actor_is_read_as_it_was_recorded(models: Models, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {"restore_from_path": models.sft, "micro_batch_size": 16},
        "data": {
            "train": models.data / "prompts.train.jsonl",
            "validation": models.data / "prompts.validation.jsonl",
            "max_prompt_length": 16,
        },
        "generation": {"max_new_tokens": 8},
        "ppo": {"max_steps": 6, "rollout_batch_size": 16, "mini_batch_size": 16, "advantages": {"estimator": "rloo"}},
        "rewards": [{"colocated": {"restore_from_path": models.rm}}, {"colocated": {"restore_from_path": models.rm}}],
        "shaping": {"energy_penalty": {"eta": 1.0}, "kl": {"coefficient": 0.1}, "combine": "mean"},
        "gold_reward": "nemo_eppo.tools.noun_task:gold_reward",
        "critic": None,
        "optimizer": {"lr": 1e-3},
    }
    settings["ppo"]["samples_per_prompt"] = 2
    job = Job("actor", 1, json.loads(json.dumps(settings, default=str)), tmp_path / "run")
    assert job.wait(300) == 0, job.log.read_text()[-4000:]
    assert main(["detect", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--calm-steps", "2"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["steps"], report["responses"]) == (6, 6 * 32)
    assert report["baseline"]["of"] == "the validation before step 1"
    assert set(report["signs"]) == {ENERGY, RISE, KL, LENGTH, VARIANCE, ENERGY_AND_KL, COMBINED}
    rows = [row for step in range(1, 7) for row in read_rows(tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl")]
    sft = report["baseline"]
    hacked = [row["reward/gold"] < sft["gold_reward"] and row["reward/proxy"] > sft["proxy_reward"] for row in rows]
    assert report["hacked"] == sum(hacked)
    rise = [row["energy/policy"] - row["energy/reference"] for row in rows]
    assert report["signs"][RISE]["auroc"]["value"] == pytest.approx(roc_auc_score(hacked, rise))
