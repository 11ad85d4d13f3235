"""Every estimator of advantages without a critic, in the real job and in every kind of layout: on functions alone,
with no server and no other job; the same numbers as plain loops over the rewards; killed and resumed bit for bit."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job, Models

from nemo_eppo.algorithms import advantages
from nemo_eppo.algorithms.choices import ESTIMATOR_SETTINGS, EstimatorName
from nemo_eppo.config import load_config
from nemo_eppo.settings.ppo import AdvantagesConfig

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {"estimator": "grpo"},
    "dr_grpo": {"estimator": "grpo", "normalize_std": False},
    "rloo": {"estimator": "rloo"},
    "reinforce_plus_plus": {"estimator": "reinforce_plus_plus"},
    "remax": {"estimator": "remax"},
}
GROUP = 4
RECORDED = 3 * GROUP  # of the 4 * GROUP responses of a step
CLIP = 13.0  # of -13.6 and more
GOLD = "nemo_eppo.tools.noun_task:gold_reward"


def settings(models: Models, estimator: str, parallel: dict[str, Any], steps: int = 1) -> dict[str, Any]:
    return {
        "model": {"restore_from_path": models.sft, "parallel": parallel, "micro_batch_size": 3},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {
            "max_steps": steps,
            "rollout_batch_size": 4,
            "samples_per_prompt": GROUP,
            "mini_batch_size": 8,
            "aggregation": "fixed" if estimator == "dr_grpo" else "token",
            "advantages": ESTIMATORS[estimator],
        },
        "rewards": [{"function": GOLD, "weight": 2.0, "mean": 0.1, "std": 0.5}],
        "shaping": {"missing_eos": {"penalty": 0.3}, "clip": {"range": CLIP}, "kl": {"coefficient": 0.1}},
        "critic": None,
        "optimizer": {"lr": 1e-3},
    }


def step(models: Models, layout: str, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one step of each estimator made: methods.json and the tensors."""
    ranks, parallel = LAYOUTS[layout]
    runs = {name: settings(models, name, parallel) for name in ESTIMATORS}
    job = Job("methods", ranks, json.loads(json.dumps(runs, default=str)), directory)
    assert job.wait(400) == 0, job.log.read_text()[-6000:]
    return json.loads((directory / "methods.json").read_text()), torch.load(
        directory / "methods.pt", weights_only=False
    )


@pytest.fixture(scope="module")
def one(models: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return step(models, "one", tmp_path_factory.mktemp("estimators") / "one")


def expected_advantages(name: str, experience: Any, greedy: list[float] | None) -> np.ndarray:
    """By loops over responses and tokens, from the shaped rewards."""
    rewards, mask = experience.rewards.double().numpy(), experience.mask.numpy()
    total = np.where(mask, rewards, 0).sum(1)
    result = np.zeros(rewards.shape)
    for b in range(len(rewards)):
        first = b // GROUP * GROUP
        group = total[first : first + GROUP]
        to_go = 0.0
        for t in reversed(range(rewards.shape[1])):
            if not mask[b, t]:
                continue
            to_go += rewards[b, t]
            result[b, t] = {
                "grpo": (total[b] - group.mean()) / (group.std(ddof=1) + 1e-6),
                "dr_grpo": total[b] - group.mean(),
                "rloo": total[b] - (group.sum() - total[b]) / (GROUP - 1),
                "reinforce_plus_plus": to_go,
                "remax": to_go - (greedy[b] if greedy else 0.0),
            }[name]
    if name == "reinforce_plus_plus":
        inside = result[mask]
        result = np.where(mask, (result - inside.mean()) / np.sqrt(inside.var() + 1e-8), 0)
    return result


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_are_those_of_plain_loops(name: str, one: tuple[dict[str, Any], dict[str, Any]]) -> None:
    made, tensors = one
    assert "error" not in made[name], made[name]
    experience = tensors[name]["experience"]
    assert experience.values is None
    assert experience.returns is None
    greedy = None
    if name == "remax":  # what the advantages leave of the rewards to go: one number per prompt
        to_go = np.where(experience.mask, experience.rewards.double().numpy(), 0)[:, ::-1].cumsum(1)[:, ::-1]
        baseline = np.where(experience.mask, to_go - experience.advantages.double().numpy(), np.nan)
        greedy = [float(np.nanmean(row)) for row in baseline]
        for prompt in range(4):
            assert np.ptp(greedy[GROUP * prompt : GROUP * (prompt + 1)]) < 1e-5, "one greedy response per prompt"
        assert len({round(value, 4) for value in greedy}) > 1
        assert max(map(abs, greedy)) == pytest.approx(CLIP), "clipped as the reward that it is taken from"
    found = experience.advantages.double().numpy()
    np.testing.assert_allclose(found, expected_advantages(name, experience, greedy), rtol=0, atol=2e-5)
    assert abs(found).max() > 0
    metrics = made[name]["metrics"]
    assert metrics["actor/grad_norm"] > 0
    assert not [metric for metric in metrics if metric.startswith("critic/")], "no critic, no metrics of one"


@pytest.mark.parametrize("layout", [pytest.param("tp2", marks=pytest.mark.slow), "pp2", "dp2"])
def test_no_layout_changes_them(
    layout: str, one: tuple[dict[str, Any], dict[str, Any]], models: Models, tmp_path: Path
) -> None:
    made, tensors = step(models, layout, tmp_path / layout)
    for name in ESTIMATORS:
        assert torch.equal(tensors[name]["batch"].tokens, one[1][name]["batch"].tokens)
        found, expected = tensors[name]["experience"].advantages, one[1][name]["experience"].advantages
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        for metric in ("actor/loss", "actor/grad_norm", "reward/final", "reward/proxy"):
            assert made[name]["metrics"][metric] == pytest.approx(one[0][name]["metrics"][metric], abs=1e-4), metric


def run(models: Models, steps: int, root: Path, name: str, directory: str, **kill: Any) -> Job:
    """A job that saves every step and trusts the engine's log-probs; `kill` says where it dies."""
    values = settings(models, "grpo", {}, steps) | {"checkpoint": {"interval": 1}, "gold_reward": GOLD}
    values["ppo"]["old_logprobs"] = "engine"
    values["record_rollouts"] = RECORDED
    changes = {"kill": kill} if kill else {}
    return Job("actor", 1, json.loads(json.dumps(values | changes, default=str)), root / name, root / directory)


def trajectory(directory: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and k != "time"} for row in rows]


def strip(row: dict[str, float]) -> dict[str, float]:
    """Without what the first step of each process has."""
    return {name: value for name, value in row.items() if "engine_mismatch" not in name}


def test_a_run_without_critic_and_servers_records_gold_rewards_and_groups(models: Models, tmp_path: Path) -> None:
    job = run(models, 2, tmp_path, "job", "run")
    assert job.wait(300) == 0, job.log.read_text()[-4000:]
    for row in trajectory(tmp_path / "run"):
        proxy = 2 * (row["reward/gold"] - 0.1) / 0.5
        assert row["reward/proxy"] == pytest.approx(proxy, abs=1e-5), "one function is both reward and gold"
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000002.jsonl").open()]
    assert len(rows) == RECORDED
    prompts = [row["prompt"] for row in rows]
    assert all(len(set(prompts[start : start + GROUP])) == 1 for start in range(0, len(prompts), GROUP))
    assert len(set(prompts)) == len(prompts) // GROUP
    assert len({row["response"] for row in rows}) > len(set(prompts)), "responses of a group differ"

    longer = run(models, 3, tmp_path, "longer", "run")
    assert longer.wait(300) == 0, longer.log.read_text()[-4000:]
    compared = ["rollout/engine_mismatch_mean" in row for row in trajectory(tmp_path / "run")]
    assert compared == [True, False, True], "the first step, and the first after a resume"


@pytest.mark.slow  # test_interrupted and test_colocated show it of runs with a critic
def test_a_killed_run_without_critic_and_servers_resumes_bit_for_bit(models: Models, tmp_path: Path) -> None:
    whole = run(models, 4, tmp_path, "whole_job", "whole")
    assert whole.wait(300) == 0, whole.log.read_text()[-4000:]
    killed = run(models, 4, tmp_path, "killed_job", "parts", phase="actor_train", call=6)
    assert killed.wait(300) == -signal.SIGKILL, killed.log.read_text()[-4000:]
    resumed = run(models, 4, tmp_path, "resumed_job", "parts")
    assert resumed.wait(300) == 0, resumed.log.read_text()[-4000:]
    made, expected = ([strip(row) for row in trajectory(tmp_path / name)] for name in ("parts", "whole"))
    assert made == expected


def test_the_settings_of_every_estimator_are_keys_with_its_own_defaults() -> None:
    for name, kind in advantages.ESTIMATORS.items():
        fields = tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
        assert ESTIMATOR_SETTINGS[name] == fields, name
        assert AdvantagesConfig.model_fields.keys() >= set(fields), name


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_the_settings_that_a_run_leaves_behind_start_it_again(name: EstimatorName) -> None:
    config = AdvantagesConfig(estimator=name)
    assert load_config(AdvantagesConfig, config.model_dump(mode="json")) == config
