"""Which settings a resumed run may have otherwise than it was started with."""

from pathlib import Path
from typing import Any

import pytest

from nemo_eppo.config import Config, ConfigError, load_config
from nemo_eppo.entry.changes import check_changes
from nemo_eppo.entry.settings import as_yaml
from nemo_eppo.settings.critic import CriticConfig
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reward_model import RewardTrainingConfig
from nemo_eppo.settings.training import SFTConfig

TEXTS = {"train": "a.jsonl", "validation": "b.jsonl"}
STARTED: dict[type[Config], dict[str, Any]] = {
    SFTConfig: {
        "model": {"restore_from_path": "base"},
        "data": TEXTS,
        "fit": {"global_batch_size": 8},
        "optimizer": {"lr": 1e-5},
    },
    RewardTrainingConfig: {
        "model": {"restore_from_path": "sft"},
        "data": TEXTS,
        "fit": {"global_batch_size": 8},
        "optimizer": {"lr": 1e-5},
    },
    CriticConfig: {
        "model": {"restore_from_path": "rm"},
        "optimizer": {"lr": 1e-5},
        "server": {"port": 5555, "certificates": "first"},
    },
    PPOConfig: {
        "model": {"restore_from_path": "sft"},
        "data": {"train": "prompts.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {"max_steps": 5, "rollout_batch_size": 8, "mini_batch_size": 4},
        "rewards": [{"server": {"url": "grpc://a:1"}}, {"function": "m:f"}],
        "optimizer": {"lr": 1e-5},
    },
}
SERVERS = [{"server": {"url": "grpc://b:2"}}, {"function": "m:f"}]


def merged(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return values | {
        name: merged(values.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in change.items()
    }


def resumed(schema: type[Config], change: dict[str, Any], directory: Path, **manager: Any) -> list[str]:
    """What is told of a start with `change`, of a run that was started without it."""
    (directory / "checkpoints" / "step_000001").mkdir(parents=True)
    manager["explicit_log_dir"] = directory
    started = STARTED[schema] | {"exp_manager": {"explicit_log_dir": directory}}
    (directory / "config.yaml").write_text(as_yaml(load_config(schema, started)))
    config: Any = load_config(schema, merged(STARTED[schema], change) | {"exp_manager": manager})
    return check_changes(config, config.exp_manager)


@pytest.mark.parametrize(
    ("schema", "change", "told"),
    [
        (SFTConfig, {"fit": {"max_steps": 7}}, ["fit.max_steps was None, now 7"]),
        (SFTConfig, {"fit": {"epochs": 2, "validation_interval": 1}}, ["fit.epochs", "fit.validation_interval"]),
        (SFTConfig, {"optimizer": {"lr": 1e-6}}, ["optimizer.lr was 1e-05, now 1e-06"]),
        (SFTConfig, {"model": {"parallel": {"tensor_model_parallel_size": 2}}}, ["model.parallel.tensor_model"]),
        (
            SFTConfig,
            {"model": {"micro_batch_tokens": 100, "recompute": True}},
            ["model.recompute", "model.micro_batch"],
        ),
        (RewardTrainingConfig, {"checkpoint": {"keep": 5}}, ["checkpoint.keep was 2, now 5"]),
        (CriticConfig, {"server": {"port": 1}}, ["server.port was 5555, now 1"]),
        (PPOConfig, {"ppo": {"max_steps": 9}, "validation": {"interval": 2}}, ["ppo.max_steps", "validation.interval"]),
        (PPOConfig, {"rewards": SERVERS}, ["rewards.0.server.url was 'grpc://a:1', now 'grpc://b:2'"]),
        (PPOConfig, {"critic": {"server": {"url": "grpc://c:3"}}}, ["critic.server.url"]),
        (
            PPOConfig,
            {"engine": {"max_batch_size": 2}, "record_rollouts": 3},
            ["engine.max_batch_size", "record_rollouts"],
        ),
        (PPOConfig, {"monitor": {"warmup_steps": 3}, "gold_reward": "m:g"}, ["monitor.warmup_steps", "gold_reward"]),
    ],
)
def test_what_a_resumed_run_may_change_is_told(
    schema: type[Config], change: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    found = resumed(schema, change, tmp_path, max_time_per_run="00:01:00:00")
    assert found.pop(0) == "exp_manager.max_time_per_run was None, now '00:01:00:00'"
    assert all(line.startswith(start) for line, start in zip(sorted(found), sorted(told), strict=True)), found


@pytest.mark.parametrize(
    ("schema", "change", "keys"),
    [
        (SFTConfig, {"seed": 1}, ["seed was 1234, now 1"]),
        (SFTConfig, {"data": {"train": "c.jsonl"}}, ["data.train was 'a.jsonl', now 'c.jsonl'"]),
        (SFTConfig, {"model": {"restore_from_path": "other"}}, ["model.restore_from_path"]),
        (SFTConfig, {"model": {"tokenizer": "other"}}, ["model.tokenizer was None, now 'other'"]),
        (SFTConfig, {"model": {"lora": {"rank": 4}}}, ["model.lora.rank was None, now 4"]),
        (SFTConfig, {"fit": {"global_batch_size": 4}}, ["fit.global_batch_size was 8, now 4"]),
        (RewardTrainingConfig, {"reward": {"kind": "odin"}}, ["reward.kind was 'bradley_terry', now 'odin'"]),
        (RewardTrainingConfig, {"ensemble": {"members": 3}}, ["ensemble.members"]),
        (CriticConfig, {"value_clip": None}, ["value_clip was 0.2, now None"]),
        (PPOConfig, {"shaping": {"energy_penalty": {"eta": 1.0}}}, ["shaping.energy_penalty.eta"]),
        (PPOConfig, {"energy": {"preset": "mlp_block"}}, ["energy.preset was 'paper', now 'mlp_block'"]),
        (PPOConfig, {"ppo": {"advantages": {"estimator": "remax"}}, "critic": None}, ["ppo.advantages.estimator"]),
        (PPOConfig, {"ppo": {"mini_batch_size": 8}}, ["ppo.mini_batch_size was 4, now 8"]),
        (PPOConfig, {"generation": {"temperature": 0.7}}, ["generation.temperature was 1.0, now 0.7"]),
        (PPOConfig, {"rewards": [*SERVERS, SERVERS[1]]}, ["rewards was 'a list of 2', now 'a list of 3'"]),
        (PPOConfig, {"rewards": SERVERS[:1]}, ["rewards was", "rewards.1.function was 'm:f', now None"]),
        (PPOConfig, {"rewards": SERVERS[::-1]}, ["rewards.0.function was None, now 'm:f'", "rewards.1.function was"]),
        (
            PPOConfig,
            {"critic": {"colocated": {"restore_from_path": "rm", "optimizer": {"lr": 1e-5}}}},
            ["critic.colocated.restore_from_path was None, now 'rm'"],
        ),
    ],
)
def test_what_makes_another_run_is_refused_by_name_unless_it_is_accepted(
    schema: type[Config], change: dict[str, Any], keys: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"exp_manager\.may_change=\[.*\]") as error:
        resumed(schema, change, tmp_path / "refused", max_time_per_run="00:01:00:00")
    for key in keys:
        assert f"\n  - {key}" in str(error.value)
    assert "max_time_per_run" not in str(error.value)
    accepted = [key.partition(" ")[0] for key in keys] + ["rewards.*"]
    told = resumed(schema, change, tmp_path / "accepted", may_change=accepted)
    assert all(any(line.startswith(key) for line in told) for key in keys)


def test_an_older_version_s_run_resumes_and_a_run_without_a_checkpoint_may_change(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    assert resumed(SFTConfig, {}, tmp_path) == []
    lines = [line for line in file.read_text().splitlines() if "allow_other_tokenizer" not in line]
    assert len(lines) < len(file.read_text().splitlines())
    file.write_text("\n".join(lines))
    manager = {"exp_manager": {"explicit_log_dir": tmp_path}}
    config = load_config(SFTConfig, STARTED[SFTConfig] | manager)
    assert check_changes(config, config.exp_manager) == []
    other = load_config(SFTConfig, STARTED[SFTConfig] | {"seed": 3} | manager)
    with pytest.raises(ConfigError):
        check_changes(other, other.exp_manager)
    (tmp_path / "checkpoints" / "step_000001").rmdir()
    assert check_changes(other, other.exp_manager) == []
