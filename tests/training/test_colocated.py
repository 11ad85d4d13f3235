"""A critic and reward models in the actor's own processes give, to the bit, what they give behind servers."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import free_port, run_ranks
from jobs import Job, Models, read_weights

from nemo_eppo.settings.model import Head

TP2 = {"tensor_model_parallel_size": 2}
PATIENCE = 500  # seconds


def settings(models: Models, layout: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "seed": 11,
        "model": {"restore_from_path": models.sft, "parallel": layout, "micro_batch_size": 2},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {
            "max_steps": 3,
            "rollout_batch_size": 8,
            "mini_batch_size": 4,
            "epochs": 2,
            "advantages": {"bootstrap_truncated": True},
        },
        "shaping": {"kl": {"coefficient": 0.1}},
        "optimizer": {"lr": 1e-3},
        **changes,
    }


def finish(job: Job, code: int = 0) -> None:
    assert job.wait(PATIENCE) == code, job.log.read_text()[-5000:]


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "second" not in name and name != "time"}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bradley_terry_on_tp2", "inform_on_one_rank"])
def test_three_steps_are_those_over_the_wire(
    case: str, models: Models, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ranks, layout, critic, reward = 2, TP2, models.rm, models.rm
    changes: dict[str, Any] = {}
    if case == "inform_on_one_rank":
        # adapters of the policy and the critic's head are drawn at random, each as in a job of its own
        ranks, layout, critic, reward = 1, {}, models.sft, request.getfixturevalue("trained")["inform"]
        changes = {"shaping": {"latent_penalty": {"gamma": 0.1}}, "reward_kind": "inform"}
        changes["model"] = settings(models, layout)["model"] | {"lora": {"rank": 2, "alpha": 4}}
    optimizer = {"lr": 1e-3, "schedule": "linear", "warmup_steps": 2}

    def run(name: str, critic_source: Any, reward_source: Any) -> dict[str, Any]:
        sources = {"critic": critic_source, "rewards": [reward_source], "held_out_reward": reward_source}
        finish(Job("steps", ranks, settings(models, layout, **changes, **sources), tmp_path / name))
        made: dict[str, Any] = torch.load(tmp_path / name / "steps.pt", weights_only=False)
        return made

    port = free_port()
    model = {"restore_from_path": critic, "parallel": layout, "micro_batch_size": 2}
    server = Job(
        "critic",
        ranks,
        {
            "model": model,
            "reward_model": reward,
            "optimizer": optimizer | {"decay_steps": 12},
            "server": {"port": port},
        },
        tmp_path / "server",
    )
    url = f"grpc://127.0.0.1:{port}"
    try:
        served = run("served", {"server": {"url": url}}, {"server": {"url": url, "job": "critic"}})
    finally:
        server.stop()
    colocated = run(
        "colocated",
        {"colocated": {"restore_from_path": critic, "optimizer": optimizer}},
        {"colocated": {"restore_from_path": reward}},
    )

    for found, expected in zip(colocated["steps"], served["steps"], strict=True):
        assert without_times(found["metrics"]) == without_times(expected["metrics"])
        for name in ("values", "rewards", "advantages", "returns"):
            assert torch.equal(getattr(found["experience"], name), getattr(expected["experience"], name)), name
    metrics = colocated["steps"][1]["metrics"]
    assert metrics["critic/grad_norm"] > 0
    assert "reward/held_out" in metrics
    assert (abs(metrics.get("reward/latent_penalty", 0)) > 0) == (case == "inform_on_one_rank")
    assert_equal(colocated["policy"], served["policy"])
    assert Path(colocated["critic"]) == tmp_path / "colocated" / "critic" / "checkpoints" / "step_000012"
    critics = [Path(made["critic"]) for made in (colocated, served)]
    assert_equal(*(run_ranks(read_weights, 1, path, models.config, "scalar")[0] for path in critics))


def test_a_killed_run_resumes_to_the_uninterrupted_one(models: Models, tmp_path: Path) -> None:
    values = settings(
        models,
        {},
        critic={"colocated": {"restore_from_path": models.rm, "optimizer": {"lr": 1e-3, "schedule": "cosine"}}},
        rewards=[{"colocated": {"restore_from_path": models.rm}}],
        checkpoint={"interval": 1},
    )
    finish(Job("actor", 1, values, tmp_path / "whole_job", tmp_path / "whole"))
    # dies when the critic's second checkpoint is complete and the actor's is not: the critic has to go back
    deadly = {**values, "kill": {"phase": "save", "call": 4}}
    finish(Job("actor", 1, deadly, tmp_path / "killed_job", tmp_path / "resumed"), -signal.SIGKILL)
    saved = {
        kind: [path.name for path in sorted((tmp_path / "resumed" / kind / "checkpoints").glob("step_*"))]
        for kind in (".", "critic")
    }
    assert saved == {".": ["step_000001"], "critic": ["step_000004", "step_000008"]}
    finish(Job("actor", 1, values, tmp_path / "resumed_job", tmp_path / "resumed"))

    rows = {
        run: [without_times(json.loads(line)) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "resumed")
    }
    assert [row["step"] for row in rows["whole"]] == [1, 2, 3]
    assert rows["resumed"] == rows["whole"]
    heads: dict[str, Head] = {"checkpoints/step_000003": "lm", "critic/checkpoints/step_000012": "scalar"}
    for name, head in heads.items():
        found, expected = (
            run_ranks(read_weights, 1, tmp_path / run / name, models.config, head)[0] for run in ("resumed", "whole")
        )
        assert_equal(found, expected)
