"""Every indicator of the hacking monitor: silent on a calm run, an alarm on a constructed one; state and settings."""

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.monitor.indicators import SFTLatents, cluster_separation_index
from nemo_eppo.monitor.monitor import Alarm, HackingMonitor
from nemo_eppo.rewards.inputs import Column, RewardInputs
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.monitor import MonitorConfig
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.shaping import ShapingConfig

STEPS, WARMUP, HACKED_FROM = 60, 10, 40
BATCH, WIDTH = 32, 8

Observation = tuple[dict[str, float], torch.Tensor]


def calm(step: int) -> Observation:
    """A step of a run in which nothing happens: noise around fixed means."""
    rng = np.random.default_rng(step)
    metrics = {
        "energy/policy": 5 + 0.1 * rng.normal(),
        "energy/reference": 4 + 0.1 * rng.normal(),
        "rollout/response_length": 200 + 5 * rng.normal(),
        "reward/proxy": 0.1 * rng.normal(),
        "reward/gold": 0.1 * rng.normal(),
        "reward/held_out": 0.1 * rng.normal(),
    }
    return metrics, torch.from_numpy(rng.normal(size=(BATCH, WIDTH)))


def from_hacked(change: Callable[[float, Observation], None]) -> Callable[[int], Observation]:
    """Calm at first; from HACKED_FROM on, `change(progress, observation)`, progress growing from 0 to 1."""

    def trajectory(step: int) -> Observation:
        observation = calm(step)
        if step >= HACKED_FROM:
            change((step - HACKED_FROM + 1) / (STEPS - HACKED_FROM), observation)
        return observation

    trajectory.__name__ = change.__name__
    return trajectory


@from_hacked
def energy_rises(progress: float, seen: Observation) -> None:
    seen[0]["energy/policy"] += 3 * progress


@from_hacked
def energy_of_both_rises(progress: float, seen: Observation) -> None:
    seen[0]["energy/policy"] += 3 * progress
    seen[0]["energy/reference"] += 3 * progress


@from_hacked
def responses_grow(progress: float, seen: Observation) -> None:
    seen[0]["rollout/response_length"] *= 1 + progress


@from_hacked
def responses_shrink(progress: float, seen: Observation) -> None:
    seen[0]["rollout/response_length"] *= 1 - progress / 2


@from_hacked
def latents_gather_elsewhere(progress: float, seen: Observation) -> None:
    hacked = round(progress * BATCH)
    seen[1][:hacked] = seen[1][:hacked] * 0.3 + 4


@from_hacked
def proxy_rises_gold_falls(progress: float, seen: Observation) -> None:
    seen[0]["reward/proxy"] += progress
    seen[0]["reward/gold"] -= progress


@from_hacked
def proxy_and_gold_rise(progress: float, seen: Observation) -> None:
    seen[0]["reward/proxy"] += progress
    seen[0]["reward/gold"] += progress


@from_hacked
def gold_falls(progress: float, seen: Observation) -> None:
    seen[0]["reward/gold"] -= progress


@from_hacked
def proxy_rises_held_out_falls(progress: float, seen: Observation) -> None:
    seen[0]["reward/proxy"] += progress
    seen[0]["reward/held_out"] -= progress


def monitor(**indicators: Any) -> HackingMonitor:
    only = {"energy": {"action": "none"}, "length": {"action": "none"}, "sft_latents": 5 * BATCH}
    return HackingMonitor(load_config(MonitorConfig, {"warmup_steps": WARMUP, **only, **indicators}))


def alarms(watch: HackingMonitor, trajectory: Callable[[int], Observation]) -> list[Alarm]:
    return [alarm for step in range(1, STEPS + 1) for alarm in watch.observe(step, *trajectory(step)).alarms]


LOG = {"action": "log"}
HELD_OUT = {"action": "log", "against": "held_out"}
FIRES = [
    ({"energy": LOG}, energy_rises),
    ({"length": LOG}, responses_grow),
    ({"length": LOG}, responses_shrink),
    ({"outliers": LOG}, latents_gather_elsewhere),
    ({"csi": LOG}, latents_gather_elsewhere),
    ({"disagreement": LOG}, proxy_rises_gold_falls),
    ({"disagreement": HELD_OUT}, proxy_rises_held_out_falls),
]
SILENT = [
    *((settings, calm) for settings, _ in FIRES),
    ({"energy": LOG}, energy_of_both_rises),  # a reference that rises as much: no rise
    ({"disagreement": LOG}, proxy_and_gold_rise),
    ({"disagreement": LOG}, gold_falls),
    ({"disagreement": HELD_OUT}, proxy_rises_gold_falls),
]


def named(value: object) -> str:
    return value.__name__ if callable(value) else "-".join(f"{k}" for k in value)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("settings", "trajectory"), FIRES, ids=named)
def test_an_indicator_fires_when_its_sign_of_hacking_shows(
    settings: dict[str, Any], trajectory: Callable[[int], Observation]
) -> None:
    raised = alarms(monitor(**settings), trajectory)
    assert raised
    assert {alarm.indicator for alarm in raised} == set(settings)
    assert all(alarm.step >= HACKED_FROM and alarm.value > alarm.threshold for alarm in raised)


@pytest.mark.parametrize(("settings", "trajectory"), SILENT, ids=named)
def test_an_indicator_is_silent_on_a_calm_run(
    settings: dict[str, Any], trajectory: Callable[[int], Observation]
) -> None:
    watch = monitor(**settings)
    assert alarms(watch, trajectory) == []
    (name,) = settings
    assert f"monitor/{name}" in watch.observe(STEPS + 1, *trajectory(STEPS)).metrics  # silent, but it did look


def test_rise_is_measured_in_standard_deviations_of_the_first_steps() -> None:
    watch = monitor(energy=LOG)
    rises = []
    for step in range(1, WARMUP + 1):
        metrics, _ = calm(step)
        rises.append(metrics["energy/policy"] - metrics["energy/reference"])
        assert watch.observe(step, metrics).metrics == {}
    seen = watch.observe(WARMUP + 1, {"energy/policy": 9.0, "energy/reference": 4.0}).metrics
    assert seen["monitor/energy"] == pytest.approx((5.0 - np.mean(rises)) / np.std(rises, ddof=1))


def test_without_the_references_energies_the_rise_is_over_the_sft_models_before_training() -> None:
    with_sft, without = monitor(energy=LOG), monitor(energy=LOG)
    with_sft.observe_sft(4.5)
    energies = [calm(step)[0]["energy/policy"] for step in range(1, WARMUP + 1)]
    for watch, base in ((with_sft, 4.5), (without, np.mean(energies))):
        for step, energy in enumerate(energies, start=1):
            watch.observe(step, {"energy/policy": energy})
        seen = watch.observe(WARMUP + 1, {"energy/policy": 6.0}).metrics
        assert seen["monitor/energy"] == pytest.approx((6.0 - base) / np.std(energies, ddof=1))


def test_what_never_moved_at_first_may_move_a_little() -> None:
    watch = monitor(length=LOG, energy=LOG)
    still = {"rollout/response_length": 512.0, "energy/policy": -0.6, "energy/reference": -0.6}
    for step in range(1, WARMUP + 1):
        watch.observe(step, still)
    seen = watch.observe(WARMUP + 1, {**still, "rollout/response_length": 510.0, "energy/policy": -0.599}).metrics
    assert 0 < seen["monitor/length"] < 1
    assert 0 < seen["monitor/energy"] < 5


def test_an_alarm_needs_consecutive_steps_and_the_count_starts_again_after_it() -> None:
    watch = monitor(length={"action": "log", "patience": 3})
    for step in range(1, WARMUP + 1):
        watch.observe(step, calm(step)[0])
    lengths = [900, 900, 200, 900, 900, 900, 900, 900, 900, 200]
    fired = [bool(watch.observe(20 + i, {"rollout/response_length": n}).alarms) for i, n in enumerate(lengths)]
    assert fired == [False, False, False, False, False, True, False, False, True, False]


def test_an_alarm_names_indicator_value_threshold_and_step() -> None:
    watch = monitor(energy={"action": "stop", "threshold": 4.0, "patience": 2})
    raised = alarms(watch, energy_rises)[0]
    assert raised.action == "stop"
    value = f"{raised.value:.3g}"
    assert f"step {raised.step}: " in str(raised)
    assert f"monitor/energy = {value}, above its threshold of 4 for 2 steps; action: stop" in str(raised)


def test_alarms_are_metrics_too() -> None:
    watch = monitor(energy=LOG)
    rows = {step: watch.observe(step, *energy_rises(step)) for step in range(1, STEPS + 1)}
    told = [step for step, seen in rows.items() if seen.metrics.get("monitor/energy/alarm")]
    assert told
    assert told == [step for step, seen in rows.items() if seen.alarms]
    assert rows[WARMUP + 1].metrics["monitor/energy/alarm"] == 0


def test_what_was_fitted_to_latents_goes_with_them() -> None:
    watch = monitor(outliers=LOG)
    state = watch.state_dict()
    for mean in (10.0, 0.0):
        watch.sft.add(mean + torch.randn(watch.sft.samples, 4, generator=torch.Generator().manual_seed(0)))
        assert watch.sft.gaussian.mean.mean().item() == pytest.approx(mean, abs=1)
        assert watch.sft.radius > 0
        watch.load_state_dict(state)


def test_a_resumed_monitor_goes_on_bit_for_bit() -> None:
    every = dict.fromkeys(("energy", "length", "outliers", "csi", "disagreement"), LOG)
    for middle in (3, WARMUP + 2, HACKED_FROM + 7):  # gathering latents, then statistics, then counting
        whole, first, second = monitor(**every), monitor(**every), monitor(**every)
        for watch in (whole, first):
            watch.observe_sft(4.0)
        expected = [whole.observe(step, *latents_gather_elsewhere(step)) for step in range(1, STEPS + 1)]
        seen = [first.observe(step, *latents_gather_elsewhere(step)) for step in range(1, middle + 1)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        seen += [second.observe(step, *latents_gather_elsewhere(step)) for step in range(middle + 1, STEPS + 1)]
        assert seen == expected
    assert any(watched.alarms for watched in expected)


def test_raise_kl_is_bounded_and_used_by_the_next_pipeline_call() -> None:
    config = load_config(ShapingConfig, {"kl": {"coefficient": 0.1}})
    pipeline = RewardPipeline(config)
    inputs = RewardInputs(
        scores=torch.zeros(2, 1),
        columns=[Column(name="model")],
        samples=[Sample(prompt="", response="", token_ids=(1,), finished=True)] * 2,
        tokens=torch.zeros(2, 4, dtype=torch.int64),
        prompt_lengths=torch.ones(2, dtype=torch.int64),
        energies=torch.zeros(2, 1),
        step=1,
        max_steps=1,
        mask=torch.ones(2, 3, dtype=torch.bool),
        truncated=torch.zeros(2, dtype=torch.bool),
        logprobs=torch.full((2, 3), -1.0),
        ref_logprobs=torch.full((2, 3), -2.0),
    )
    watch = HackingMonitor(MonitorConfig(kl_factor=3.0, kl_max=0.5))
    paid = [pipeline(inputs).token_rewards]
    for coefficient in (0.3, 0.5, 0.5):
        pipeline.kl.set_coefficient(watch.raised_kl(pipeline.kl.coefficient))
        assert pipeline.kl.coefficient == pytest.approx(coefficient)
        paid.append(pipeline(inputs).token_rewards)
    torch.testing.assert_close(paid[1], 3 * paid[0])
    torch.testing.assert_close(paid[2], 5 * paid[0])
    assert watch.raised_kl(0.7) == 0.7  # an adaptive controller may be above kl_max: never lowered
    resumed = RewardPipeline(config)
    resumed.load_state_dict(pipeline.state_dict())
    assert resumed.kl.coefficient == pipeline.kl.coefficient


def test_separation_of_clusters() -> None:
    rng = np.random.default_rng(0)
    sft = torch.from_numpy(rng.normal(size=(50, 2))) * 0.1
    near, far = torch.tensor([[3.0, 0.0]]).repeat(6, 1), torch.tensor([[0.0, -7.0]]).repeat(9, 1)
    alone = torch.tensor([[100.0, 100.0]])  # in no cluster
    expected = 6 * float((sft - near[0]).norm(dim=1).min()) + 9 * float((sft - far[0]).norm(dim=1).min())
    found = cluster_separation_index(torch.cat([near, alone, far]), sft, radius=0.5)
    assert found == pytest.approx(expected, rel=1e-6)
    assert cluster_separation_index(alone, sft, radius=0.5) == 0


def test_the_sft_models_latents_are_those_of_the_first_responses() -> None:
    sft = SFTLatents(40)
    for step in (1, 2, 3):
        if not sft.complete:
            sft.add(calm(step)[1])
    assert sft.complete
    expected = torch.cat([calm(1)[1], calm(2)[1]])[:40].float()
    torch.testing.assert_close(sft.latents, expected, rtol=0, atol=0)
    distances = np.sort(np.linalg.norm(expected.numpy()[:, None] - expected.numpy()[None], axis=-1), axis=1)
    assert sft.radius == pytest.approx(np.quantile(distances[:, 5], 0.95), rel=1e-5)


BASE = {
    "model": {"restore_from_path": "sft"},
    "data": {"train": "prompts.jsonl", "max_prompt_length": 8},
    "generation": {"max_new_tokens": 8},
    "ppo": {"max_steps": 1, "rollout_batch_size": 2, "mini_batch_size": 2},
    "optimizer": {"lr": 1e-6},
}


@pytest.mark.parametrize(
    ("monitor", "shaping", "message"),
    [
        ({"energy": {"action": "raise_kl"}}, {}, "monitor.energy.action = 'raise_kl' needs 0 < shaping.kl.coefficient"),
        ({"length": {"action": "raise_kl"}}, {"kl": {"coefficient": 1.0}}, "< monitor.kl_max, got 1.0 and 1.0"),
        ({"disagreement": {"action": "log"}}, {}, "monitor.disagreement.against = 'gold' needs gold_reward"),
        ({"disagreement": HELD_OUT}, {}, "'held_out' needs held_out_reward"),
        ({"energy": {"action": "halt"}}, {}, "monitor.energy.action = 'halt'"),
        ({"enrgy": {"action": "stop"}}, {}, "monitor.enrgy: unknown key"),
    ],
)
def test_settings_that_cannot_work_are_refused(monitor: dict[str, Any], shaping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PPOConfig, {**BASE, "shaping": shaping, "monitor": monitor})


@pytest.mark.parametrize("name", ["outliers", "csi"])
def test_indicators_on_latents_refuse_reward_models_without(name: str) -> None:
    monitor(energy=LOG).check_latents(0)
    monitor(**{name: LOG}).check_latents(16)
    with pytest.raises(ConfigError, match=f"monitor.{name}.action = 'log' needs latents"):
        monitor(**{name: LOG}).check_latents(0)


DATA = Path(os.environ.get("NEMO_EPPO_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
PUBLISHED = DATA / "eppo-demo" / "published_energies.csv"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is missing; NEMO_EPPO_DATA says where the data are")
def test_the_energy_indicator_separates_published_hacked_responses_from_normal_ones() -> None:
    with PUBLISHED.open() as file:
        rows = list(csv.DictReader(file))
    hacked = np.array([row["label"] == "hacking" for row in rows])
    energies = [{"energy/policy": float(r["rlhf_energy_loss"])} for r in rows]
    pairs = [{**e, "energy/reference": float(r["sft_energy_loss"])} for e, r in zip(energies, rows, strict=True)]
    normal = np.random.default_rng(0).permutation(np.flatnonzero(~hacked))  # the table is sorted by kind of prompt

    def mean(observed: list[dict[str, float]], chosen: np.ndarray) -> dict[str, float]:
        return {name: math.fsum(observed[i][name] for i in chosen) / len(chosen) for name in observed[0]}

    for observed, auroc in ((energies, 1.000), (pairs, 0.991)):
        watch = monitor(energy=LOG)
        for step in range(WARMUP):  # steps of 16 normal responses
            assert watch.observe(step + 1, mean(observed, normal[16 * step : 16 * step + 16])).metrics == {}
        state = watch.state_dict()
        each = [watch.observe(100, row).metrics["monitor/energy"] for row in observed]
        assert roc_auc_score(hacked, each) == pytest.approx(auroc, abs=5e-4)

        watch.load_state_dict(state)
        later = normal[16 * WARMUP :]
        for step, share in enumerate([0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5], start=WARMUP + 1):
            few = round(16 * share)
            chosen = np.concatenate([np.flatnonzero(hacked)[:few], later[16 * step - 176 : 16 * step - 160 - few]])
            raised = watch.observe(step, mean(observed, chosen)).alarms
            assert bool(raised) == (step == WARMUP + 7)


def test_an_indicator_of_ones_own_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"indicators: the name energy is taken"):
        monitor(indicators=[{"name": "energy", "indicator": "x:Y"}])
    with pytest.raises(ConfigError, match=r"monitor\.indicators\.mine\.indicator = 'json:dumps' is no subclass"):
        monitor(indicators=[{"name": "mine", "indicator": "json:dumps"}])
