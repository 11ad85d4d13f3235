"""`colocate: true`: the critic and reward jobs of a launch file become settings of their actor."""

from pathlib import Path
from typing import Any

import pytest
from jobs import Models
from launched import eppo, write

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.launch.colocation import colocated
from nemo_eppo.launch.job import job_settings
from nemo_eppo.launch.launch_file import LaunchConfig, read_launch
from nemo_eppo.observability.metrics import read_metrics


def read(values: dict[str, Any], directory: Path, *changes: str) -> LaunchConfig:
    return colocated(read_launch(write(values, directory / "launch.yaml"), changes))


def test_models_and_learning_move_into_the_actor_and_nothing_else(models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    values["jobs"]["sft"] = {"script": "train_gpt_sft"}
    values["jobs"]["reward"]["needs"] = ["sft"]
    critic = values["jobs"]["critic"]["settings"]
    critic |= {"optimizer.lr": 3e-4, "model.micro_batch_size": 64, "reward_model": str(models.rm)}
    launch = read(values, tmp_path, "jobs.actor.colocate=true")
    assert list(launch.jobs) == ["actor", "sft"]
    actor = launch.jobs["actor"]
    assert actor.needs == ("sft",)
    assert actor.setting("critic.colocated.restore_from_path") == str(models.rm)
    assert actor.setting("critic.colocated.optimizer.lr") == 3e-4
    assert actor.setting("critic.colocated.optimizer.weight_decay") == 0.1, "the critic job's own default"
    assert actor.setting("rewards") == [{"colocated": {"restore_from_path": str(models.rm)}}] * 2
    assert actor.setting("model.micro_batch_size") is None
    without = read(values, tmp_path)
    assert list(without.jobs) == list(values["jobs"])
    held_out = read(values, tmp_path, "jobs.actor.colocate=true", "jobs.actor.held_out=reward").jobs["actor"]
    assert len(held_out.setting("rewards")) == 1
    assert held_out.setting("held_out_reward.colocated.restore_from_path") == str(models.rm)


def test_a_reward_that_names_a_job_keeps_its_weight(models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    values["jobs"]["critic"]["settings"]["reward_model"] = str(models.sft)
    function = {"function": "rewards:length"}
    values["jobs"]["actor"]["settings"]["rewards"] = [
        {"job": "reward", "weight": 0.7, "server": {"request_timeout": 5}},
        function,
        {"job": "critic", "mean": 1.0},
    ]
    actor = read(values, tmp_path, "jobs.actor.colocate=true").jobs["actor"]
    assert actor.setting("rewards") == [
        {"weight": 0.7, "colocated": {"restore_from_path": str(models.rm)}},
        function,
        {"mean": 1.0, "colocated": {"restore_from_path": str(models.sft)}},
    ]


def test_what_an_actor_says_of_its_critic_and_held_out_reward_is_kept(models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    own = values["jobs"]["actor"]["settings"]
    own |= {"critic.fresh": True, "critic.server.request_timeout": 5, "held_out_reward": {"mean": 0.5, "std": 2.0}}
    own["rewards"] = [{"function": "rewards:length"}]
    changes = ("jobs.actor.colocate=true", "jobs.actor.held_out=reward")
    settings = job_settings(read(values, tmp_path, *changes), "actor")
    assert settings.critic.fresh
    assert settings.critic.server is None
    assert (settings.held_out_reward.mean, settings.held_out_reward.std) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("jobs.critic.colocate=true", r"jobs\.critic\.colocate = true: serve_ppo_critic asks no servers"),
        ("jobs.other={script: train_gpt_sft, needs: [reward]}", "the job other needs reward, too"),
    ],
)
def test_what_cannot_be_colocated_is_named(change: str, message: str, models: Models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(eppo(models, tmp_path / "out"), tmp_path, "jobs.actor.colocate=true", change)


def test_one_word_runs_a_launch_without_servers(models: Models, tmp_path: Path) -> None:
    file = write(eppo(models, tmp_path / "out"), tmp_path / "launch.yaml")
    assert main(["launch", str(file), "jobs.actor.colocate=true"]) == 0
    metrics = read_metrics(tmp_path / "out" / "actor" / "metrics.jsonl")
    assert metrics["critic/loss"][0] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "out" / "logs").iterdir()) == ["actor.log"]
