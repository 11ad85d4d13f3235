"""The hacking monitor in a real run: an alarm raises the KL coefficient, for good, and another one ends the run."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, Models

from nemo_eppo.models import checkpoint_files

COEFFICIENT = 0.01


def settings(models: Models, reward_url: str, ranks: int, length: dict[str, Any], max_steps: int) -> dict[str, Any]:
    return {
        "model": {"restore_from_path": models.sft, "parallel": {"tensor_model_parallel_size": ranks}},
        "data": {
            "train": models.data / "prompts.train.jsonl",
            "validation": models.data / "prompts.train.jsonl",
            "max_prompt_length": 16,
        },
        "generation": {"max_new_tokens": 20},
        "validation": {"max_prompts": 4},
        "ppo": {
            "max_steps": max_steps,
            "rollout_batch_size": 4,
            "samples_per_prompt": 2,
            "mini_batch_size": 8,
            "advantages": {"estimator": "rloo"},
        },
        "shaping": {"kl": {"coefficient": COEFFICIENT}, "energy_penalty": {"eta": 2.0}},
        "optimizer": {"lr": 1e-3},
        # a threshold that no mean length stays under, but for that of the first steps
        "monitor": {"warmup_steps": 2, "length": {"threshold": 1e-9, **length}},
        "critic": None,
        "rewards": [{"server": {"url": reward_url}}],
        "held_out_reward": {"server": {"url": reward_url}},
    }


@pytest.mark.slow
def test_alarms_raise_the_kl_and_stop_the_run(models: Models, reward_url: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs: list[Job] = []
    try:
        for ranks, length, max_steps in (
            (1, {"action": "raise_kl", "patience": 1}, 4),
            (2, {"action": "stop", "patience": 2}, 1000),  # one verdict for all ranks, or they wait for each other
            (1, {"action": "stop", "patience": 2}, 1000),  # it has ended
        ):
            values = settings(models, reward_url, ranks, length, max_steps)
            jobs.append(Job("actor", ranks, values, tmp_path / f"actor_{len(jobs)}", run))
            assert jobs[-1].wait(240) == 0, jobs[-1].log.read_text()[-4000:]
    finally:
        for job in jobs:
            job.stop()

    before, *steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    coefficient = COEFFICIENT
    for row in steps:
        assert row["reward/kl"] == pytest.approx(-coefficient * row["kl/policy_reference"], rel=1e-5, abs=1e-12)
        assert row["reward/held_out"] == pytest.approx(row["reward/proxy"], abs=1e-5)  # the same model, here
        if row["step"] <= 4 and row.get("monitor/length/alarm"):
            coefficient *= 2

    stop = steps[-1]
    assert [row["step"] for row in steps if row["step"] > 4 and row["monitor/length/alarm"]] == [stop["step"]]
    assert 6 <= stop["step"] < 1000
    assert f"{stop['step']} steps are done, the monitor ended the run: nothing is left" in jobs[-1].log.read_text()
    log = jobs[-2].log.read_text()
    assert f"step {stop['step']}: signs of reward hacking: monitor/length = {stop['monitor/length']:.3g}" in log
    assert "above its threshold of 1e-09 for 2 steps; action: stop" in log
    assert "validation/energy_loss" in stop  # the last step of a run is validated, whyever it is the last

    newest = checkpoint_files.latest(run / "checkpoints")
    assert newest is not None
    manifest = checkpoint_files.verify(newest)
    assert manifest.step == stop["step"]
    assert manifest.state["pipeline"]["kl"]["coefficient"] == coefficient > COEFFICIENT
    assert manifest.state["monitor"]["indicators"]["energy"]["sft"] == before["validation/energy_loss"]
