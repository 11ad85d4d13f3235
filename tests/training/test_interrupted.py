"""PPO that is killed, told to stop, or started again in another layout is the PPO that was never interrupted."""

import json
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import free_port, run_ranks
from jobs import Job, Models, read_weights
from small_data import read_rows

from nemo_eppo.config import NOT_FINISHED
from nemo_eppo.evaluation.score import Scoring
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.evaluation import ScoreConfig
from nemo_eppo.settings.model import Head

STEPS = 5
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@dataclass
class Runs:
    """Starts critics and actors over the run directories `critic` and `actor` below `root`."""

    models: Models
    reward_url: str
    root: Path
    started: int = 0

    def start(self, kind: str, ranks: int, settings: dict[str, Any]) -> Job:
        self.started += 1
        return Job(kind, ranks, settings, self.root / f"{kind}_{self.started}", self.root / kind)

    def critic(self, port: int, ranks: int = 1, parallel: Any = None, **extra: Any) -> Job:
        model = {"restore_from_path": self.models.rm, "parallel": parallel or {}}
        settings = {"model": model, "server": {"port": port}, "optimizer": {"lr": 1e-3}, **extra}
        return self.start("critic", ranks, settings)

    def actor(self, port: int, ranks: int = 1, parallel: Any = None, steps: int = STEPS, **extra: Any) -> Job:
        settings = {
            "model": {"restore_from_path": self.models.sft, "parallel": parallel or {}},
            "data": {
                "train": self.models.data / "prompts.train.jsonl",
                "validation": self.models.data / "prompts.validation.jsonl",
                "max_prompt_length": 16,
            },
            "generation": {"max_new_tokens": 20},
            "ppo": {
                "max_steps": steps,
                "rollout_batch_size": 8,
                "mini_batch_size": 4,
            },
            "shaping": {
                "energy_penalty": {"eta": 2.0, "standardize": True},  # running statistics that a resume has to restore
                "kl": {"coefficient": 0.1, "controller": "adaptive", "target": 0.01, "horizon": 100},
            },
            "optimizer": {"lr": 1e-3, "schedule": "linear", "decay_steps": 2 * STEPS},
            "checkpoint": {"interval": 1, "best": "validation/proxy_reward"},
            "critic": {"server": {"url": f"grpc://127.0.0.1:{port}", "connect_timeout": 60}},
            "rewards": [{"server": {"url": self.reward_url}}],
            **extra,
        }
        return self.start("actor", ranks, settings)

    def trajectory(self) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (self.root / "actor" / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if "second" not in k and k != "time"} for row in rows]

    def saved(self, kind: str) -> list[str]:
        return sorted(path.name for path in (self.root / kind / "checkpoints").iterdir())

    def weights(self, kind: str, name: str) -> dict[str, torch.Tensor]:
        head: Head = "lm" if kind == "actor" else "scalar"
        path = self.root / kind / "checkpoints" / name
        return run_ranks(read_weights, 1, path, self.models.config, head)[0]


def left_of(job: Job) -> list[int]:
    """Processes of a job, a few moments after it was killed."""
    for _ in range(50):
        command = ["pgrep", "-f", f"{job.directory}/config.json"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
        if not found:
            break
        time.sleep(0.1)
    return [int(number) for number in found]


def log(job: Job) -> str:
    return job.log.read_text()[-5000:]


@pytest.fixture(scope="module")
def whole(models: Models, reward_url: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The uninterrupted run."""
    runs, port = Runs(models, reward_url, tmp_path_factory.mktemp("whole")), free_port()
    critic = runs.critic(port)
    try:
        actor = runs.actor(port)
        assert actor.wait(200) == 0, log(actor)
    finally:
        critic.stop()
    assert [row["step"] for row in runs.trajectory()] == [0, 1, 2, 3, 4, 5]
    return runs


def test_a_run_killed_again_and_again_is_the_uninterrupted_one(whole: Runs, tmp_path: Path) -> None:
    runs, port = Runs(whole.models, whole.reward_url, tmp_path), free_port()
    critic = runs.critic(port)
    try:
        # a call number counts from the restart; the first run is killed before there is any checkpoint. What is killed
        # between two checkpoints loses the same in whichever phase
        for phase, call in (
            ("critic_train", 1),
            ("generate", 3),
            ("save", 2),
            ("saved", 1),
            ("actor_train", 2),
        ):
            actor = runs.actor(port, kill={"phase": phase, "call": call})
            assert actor.wait(100) == -signal.SIGKILL, f"{phase}: {log(actor)}"
            assert left_of(actor) == [], phase
        critic.stop(signal.SIGKILL)
        critic = runs.critic(port, kill={"phase": "critic", "call": 2})  # and now the critic, between two updates
        actor = runs.actor(port)
        critic.wait(100)
        critic = runs.critic(port)  # for which the same actor has waited
        assert actor.wait(200) == 0, log(actor)
        assert f"critic server at grpc://127.0.0.1:{port} unavailable for critic_train" in log(actor)
        assert "all servers answer again" in log(actor)
    finally:
        critic.stop()
    assert runs.trajectory() == whole.trajectory()
    for kind, name in (("actor", "step_000005"), ("critic", "step_000010")):
        found, expected = runs.weights(kind, name), whole.weights(kind, name)
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert torch.equal(found[tensor], value), tensor


def test_the_newest_and_the_best_checkpoint_stay_with_their_critics(whole: Runs) -> None:
    rewards = {row["step"]: row["validation/proxy_reward"] for row in whole.trajectory() if row["step"]}
    best = max(rewards, key=rewards.__getitem__)
    kept = {best, 4, 5}
    assert whole.saved("actor") == ["best", *(f"step_{step:06d}" for step in sorted(kept))]
    manifest = checkpoint_files.verify(whole.root / "actor" / "checkpoints" / "best")
    assert (manifest.step, manifest.metrics["validation/proxy_reward"]) == (best, rewards[best])
    assert {f"step_{2 * step:06d}" for step in kept} <= set(whole.saved("critic"))


def score(model: Path, data: Path, output: Path) -> list[dict[str, Any]]:
    """The scores of `data` under `model`; for `run_ranks`."""
    Scoring(ScoreConfig(model=model, data=data, output=output)).run()
    return read_rows(output)


def test_scores_of_a_rollout_file_are_what_the_run_recorded(whole: Runs, tmp_path: Path) -> None:
    rollouts = whole.root / "actor" / "rollouts" / "step_000005.jsonl"
    policy = whole.root / "actor" / "checkpoints" / "step_000004"  # what sampled them
    [scored] = run_ranks(score, 1, policy, rollouts, tmp_path / "policy.jsonl")
    [reference] = run_ranks(score, 1, whole.models.sft, rollouts, tmp_path / "reference.jsonl")
    recorded = read_rows(rollouts)
    assert {row["finished"] for row in recorded} == {True, False}
    for row, found, under_reference in zip(recorded, scored, reference, strict=True):
        assert found["num_tokens"] == row["response_length"] == len(row["response_ids"])
        assert found["energy_loss"] == pytest.approx(row["energy/policy"], abs=1e-6)
        assert found["logprob"] - under_reference["logprob"] == pytest.approx(row["kl/policy_reference"], abs=1e-4)


@pytest.mark.slow  # tests/megatron/test_resume.py shows it of one model
def test_a_run_goes_on_in_another_layout(whole: Runs, tmp_path: Path) -> None:
    runs, port = Runs(whole.models, whole.reward_url, tmp_path), free_port()
    for steps, actor_layout, critic_layout in ((1, TP2, PP2), (2, {}, TP2)):
        critic = runs.critic(port, 2, critic_layout)
        try:
            actor = runs.actor(port, 2, actor_layout, steps=steps)
            assert actor.wait(100) == 0, log(actor)
        finally:
            critic.stop()
    expected = [row for row in whole.trajectory() if row["step"] <= 2]
    for row, wanted in zip(runs.trajectory(), expected, strict=True):
        for name in [name for name in row.keys() - wanted.keys() if name.startswith("validation/")]:
            del row[name]  # after the last step of each start
        clipped = {name for name in wanted if name.endswith("clip_fraction")}  # one token may be right at the border
        for name in clipped:
            assert row.pop(name) == pytest.approx(wanted.pop(name), abs=0.01), name
        assert row == pytest.approx(wanted, abs=2e-5), row["step"]


def test_sigterm_and_the_time_limit_end_a_run_with_a_checkpoint(whole: Runs, tmp_path: Path) -> None:
    runs, port = Runs(whole.models, whole.reward_url, tmp_path), free_port()
    rarely: dict[str, Any] = {"checkpoint": {"interval": 100, "best": "validation/proxy_reward"}}
    critic = runs.critic(port)
    try:
        late = runs.actor(port, exp_manager={"max_time_per_run": "00:00:00:01"}, **rarely)
        assert late.wait(100) == NOT_FINISHED, log(late)
        assert "max_time_per_run = 00:00:00:01: saving, then ending" in log(late)
        saved = tmp_path / "actor" / "checkpoints" / "step_000001"
        assert f"PPO ended after step 1 of {STEPS}; its checkpoint is {saved}" in log(late).splitlines()[-1]
        assert runs.saved("actor") == ["best", "step_000001"]
        told = runs.actor(port, **rarely)
        told.wait_for(lambda: [row["step"] for row in runs.trajectory()][-1] >= 2)
        told.process.terminate()
        assert told.wait(100) == NOT_FINISHED, log(told)
        assert "SIGTERM: saving, then ending" in log(told)
        steps = [row["step"] for row in runs.trajectory()]
        assert steps[-1] < STEPS
        assert runs.saved("actor")[-1] == f"step_{steps[-1]:06d}"
        last = runs.actor(port, **rarely)
        assert last.wait(100) == 0, log(last)
    finally:
        critic.stop()
    updates = 2 * STEPS
    saved = tmp_path / "critic" / "checkpoints" / f"step_{updates:06d}"
    assert f"the critic ended after update {updates}; its newest checkpoint is {saved}" in log(critic)
    found, expected = (
        [{k: v for k, v in row.items() if not k.startswith("validation/")} for row in of.trajectory()]
        for of in (runs, whole)
    )
    assert found == expected  # but for the validations, which come with checkpoints


def test_a_damaged_checkpoint_is_named_and_the_one_before_works(whole: Runs, tmp_path: Path) -> None:
    runs, port = Runs(whole.models, whole.reward_url, tmp_path), free_port()
    for kind in ("actor", "critic"):
        shutil.copytree(whole.root / kind, tmp_path / kind, symlinks=True)
    newest = tmp_path / "actor" / "checkpoints" / "step_000005"
    file = max((newest / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    critic = runs.critic(port)
    try:
        actor = runs.actor(port)
        assert actor.wait(100) == 2, log(actor)
        said = log(actor)
        assert f"{newest} is damaged: the content of weights/{file.name} is not what its manifest says" in said
        command = said.split("step_000004: ")[1].splitlines()[0]
        assert command == f"mv {newest} {newest.parent / 'damaged_step_000005'}"
        newest.rename(newest.parent / "damaged_step_000005")
        actor = runs.actor(port)
        assert actor.wait(100) == 0, log(actor)
    finally:
        critic.stop()
    assert runs.trajectory() == whole.trajectory()


def test_a_critic_that_does_not_fit_is_refused(whole: Runs, tmp_path: Path) -> None:
    runs, port = Runs(whole.models, whole.reward_url, tmp_path), free_port()
    shutil.copytree(whole.root / "critic", tmp_path / "critic")
    shutil.rmtree(tmp_path / "critic" / "checkpoints" / "step_000010")
    critic = runs.critic(port)
    try:
        actor = runs.actor(port)
        assert actor.wait(100) != 0
        assert "the critic has made 8 updates of another run" in log(actor)
        shutil.rmtree(tmp_path / "actor")
        shutil.copytree(whole.root / "actor", tmp_path / "actor", symlinks=True)
        actor = runs.actor(port)
        assert actor.wait(100) != 0
        assert "the critic cannot go back to update 10" in log(actor)
    finally:
        critic.stop()


def test_undone_steps_leave_no_files_and_other_models_are_noticed(whole: Runs, tmp_path: Path) -> None:
    runs, port = Runs(whole.models, whole.reward_url, tmp_path), free_port()
    for kind in ("actor", "critic"):
        shutil.copytree(whole.root / kind, tmp_path / kind, symlinks=True)
    later = [tmp_path / "actor" / folder / "step_000099.jsonl" for folder in ("rollouts", "validation")]
    for file in later:
        shutil.copy(file.with_name("step_000005.jsonl"), file)
    other = tmp_path / "sft"
    shutil.copytree(whole.models.sft, other)
    critic = runs.critic(port)
    try:
        rewards = [{"server": {"url": runs.reward_url}, "mean": 0.125}]  # as another reward model might have
        actor = runs.actor(port, model={"restore_from_path": other}, rewards=rewards)  # a copy
        assert actor.wait(100) == 0, log(actor)
        assert "had other rewards" in log(actor)
        assert "they are [[0.125, " in log(actor)
        assert not [file for file in later if file.exists()]
        manifest = other / checkpoint_files.MANIFEST
        manifest.write_text(manifest.read_text().replace('"step": 0', '"step": 1'))
        actor = runs.actor(port, model={"restore_from_path": other})
        assert actor.wait(100) == 2, log(actor)
    finally:
        critic.stop()
    assert f"{other} is not the model that the run of" in log(actor)
    assert runs.trajectory() == whole.trajectory()
