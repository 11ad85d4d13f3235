"""Bad settings and files end a job with one message that names them, before any model is built."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from jobs import Models

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.megatron import model
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.model import ModelSetup
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reward_model import RewardTrainingConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.training import SFTConfig
from nemo_eppo.training.ppo_job import PPOJob
from nemo_eppo.training.reward_model import train_reward_model
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.sft import train_sft

COLOCATED_CRITIC = {"restore_from_path": "x", "optimizer": {"lr": 1e-6}}


def actor_settings(models: Models) -> dict[str, Any]:
    return {
        "model": {"restore_from_path": models.sft},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {"max_steps": 1, "rollout_batch_size": 8, "mini_batch_size": 8},
        "optimizer": {"lr": 1e-6},
    }


def a_run(directory: Path) -> Run:
    return Run(directory, 0, logging.getLogger(), ExpManagerConfig())


@pytest.fixture(autouse=True)
def _no_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built before the settings were checked")

    monkeypatch.setattr(model._Decoder, "__init__", refuse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": {"epoch": 2}}, r"ppo\.epoch: unknown key \(did you mean 'epochs'\?\)"),
        (
            {"shaping": {"energy_penalty": {"eta": -1}}},
            r"shaping\.energy_penalty\.eta = -1: .*greater than or equal to 0",
        ),
        ({"energy": {"preset": "mlp"}}, r"energy\.preset = 'mlp'"),
        ({"critic": None}, r"critic = null: ppo\.advantages\.estimator 'gae' needs a critic"),
        ({"ppo": {"advantages": {"estimator": "rloo"}}}, "samples_per_prompt = 1: .*'rloo'.* expected at least 2"),
        (
            {"ppo": {"advantages": {"estimator": "remax"}}},
            r"critic is set, but ppo\.advantages\.estimator 'remax' needs none: expected null",
        ),
        ({"ppo": {"advantages": {"estimator": "remax", "lam": 0.9}}}, "estimator 'remax' has no lam"),
        ({"rewards": []}, "rewards = .*at least 1 item"),
        ({"rewards": [{}]}, r"rewards\.0: expected exactly one of server, colocated and function"),
        (
            {"rewards": [{"function": "x:y", "colocated": {"restore_from_path": "x"}}]},
            r"rewards\.0: expected exactly one",
        ),
        ({"rewards": [{"colocated": {}}]}, r"rewards\.0\.colocated\.restore_from_path: required"),
        (
            {
                "shaping": {"combine": "wco"},
                "rewards": [{"colocated": {"restore_from_path": "x"}, "weight": w} for w in (1, 0.5)],
            },
            r"rewards\[1\]\.weight = 0\.5 with shaping\.combine = 'wco'",
        ),
        ({"held_out_reward": {"weight": 2.0}}, r"held_out_reward: expected exactly one of server, colocated and"),
        (
            {"critic": {"server": {"url": "grpc://x:1"}, "colocated": COLOCATED_CRITIC}},
            r"critic: expected exactly one of server and colocated",
        ),
        ({"critic": {"server": None}}, r"critic: expected exactly one of server and colocated"),
        ({"critic": {"colocated": {"restore_from_path": "x"}}}, r"critic\.colocated\.optimizer: required"),
        ({"ppo": {"mini_batch_size": 3}}, "8 x samples_per_prompt = 1 is not divisible by mini_batch_size = 3"),
        ({"ppo": {"max_steps": None}}, r"ppo\.max_steps = None"),
        ({"optimizer": {"lr": "fast"}}, r"optimizer\.lr = 'fast'"),
        ({"critic": {"server": {"url": "localhost"}}}, r"critic\.server\.url = 'localhost'"),
        ({"model": {"parallel": {"sequence_parallel": True}}}, "needs tensor_model_parallel_size > 1"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str, models: Models) -> None:
    settings = actor_settings(models)
    for section, values in changes.items():
        settings[section] = {**settings[section], **values} if section in settings else values
    with pytest.raises(ConfigError, match=message):
        load_config(PPOConfig, settings)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"train": "missing.jsonl"}, r"missing\.jsonl"),
        ("data", {"max_prompt_length": 5}, r"prompts\.train\.jsonl:1: .* tokens .* max_prompt_length = 5"),
        ("data", {"max_prompt_length": 40}, "40 .* 20 is more than the model's window of 48 tokens"),
        ("energy", {"layers": [7]}, "energy.layers: 7 is not a layer of a model with 4 layers"),
        ("model", {"restore_from_path": "nowhere"}, "model.restore_from_path: nowhere does not exist"),
        ("model", {"tokenizer": "nowhere"}, "nowhere"),
        (
            "model",
            {"parallel": {"tensor_model_parallel_size": 8}},
            "num_attention_heads = 4 is not divisible by tensor_model_parallel_size = 8",
        ),
        (
            "model",
            {"parallel": {"pipeline_model_parallel_size": 3}},
            r"num_layers = 4 is not divisible by pipeline \(x virtual\) stages = 3",
        ),
        ("model", {"parallel": {"tensor_model_parallel_size": 2}}, "world size 1 is not divisible by"),
        ("ppo", {"rollout_batch_size": 64}, "the data set has 32 examples, fewer than one global batch of 64"),
    ],
)
def test_impossible_layouts_and_bad_files_are_named(
    section: str, values: dict[str, Any], message: str, models: Models, tmp_path: Path
) -> None:
    settings = actor_settings(models)
    settings[section] = {**settings.get(section, {}), **values}
    with pytest.raises(ConfigError, match=message):
        PPOJob(load_config(PPOConfig, settings), a_run(tmp_path))


def another(models: Models, directory: Path, **changes: Any) -> Path:
    """The reward model, with another manifest."""
    shutil.copytree(models.rm, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["model"].update(changes)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "tokenizer" not in name}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_colocated_models_that_do_not_fit_are_named(models: Models, tmp_path: Path) -> None:
    def said(critic: Path | str = models.rm, reward: Path | str = models.rm, **changes: Any) -> str:
        sources = {
            "critic": {"colocated": {"restore_from_path": critic, "optimizer": {"lr": 1e-6, "schedule": "cosine"}}},
            "rewards": [{"colocated": {"restore_from_path": models.rm}}],
            "held_out_reward": {"colocated": {"restore_from_path": reward}},
        }
        try:
            PPOJob(load_config(PPOConfig, {**actor_settings(models), **sources, **changes}), a_run(tmp_path))
        except ConfigError as error:
            return str(error)
        return ""

    assert said() == ""
    assert said(critic="nowhere") == "critic.colocated.restore_from_path: nowhere does not exist"
    assert said(reward="nowhere") == "held_out_reward.colocated.restore_from_path: nowhere does not exist"
    assert f"held_out_reward.colocated.restore_from_path: {models.sft} holds a model with head 'lm'" in said(
        reward=models.sft
    )
    assert "reward_kind = 'odin', but rewards[0].colocated has a reward model of kind 'b" in said(reward_kind="odin")
    short = another(models, tmp_path / "short", max_sequence_length=30)
    message = f"has a window of 30 tokens; expected at least {16 + 20}, the longest prompt and response together"
    for key, found in (("critic", said(critic=short)), ("held_out_reward", said(reward=short))):
        assert found == f"{key}.colocated.restore_from_path: {short} {message}"
    foreign = another(models, tmp_path / "foreign")
    shutil.rmtree(foreign / "tokenizer")
    word_level(["red", "green"], foreign / "tokenizer")
    for key, found in (("critic", said(critic=foreign)), ("held_out_reward", said(reward=foreign))):
        said_of = f"{key}.colocated.restore_from_path: {foreign} has another tokenizer than the policy: vocabulary of "
        assert found.startswith(said_of)


def test_an_empty_data_set_is_named(models: Models, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    settings = actor_settings(models)
    settings["data"] = {"train": empty, "max_prompt_length": 16}
    with pytest.raises(ConfigError, match=r"empty\.jsonl: no examples"):
        PPOJob(load_config(PPOConfig, settings), a_run(tmp_path))


def test_a_gold_reward_that_does_not_exist_is_named(models: Models, tmp_path: Path) -> None:
    config = load_config(PPOConfig, {**actor_settings(models), "gold_reward": "nemo_eppo.tools.noun_task:gold"})
    with pytest.raises(ConfigError, match=r"gold_reward = 'nemo_eppo\.tools\.noun_task:gold'"):
        PPOJob(config, a_run(tmp_path))


def test_the_wrong_kind_of_checkpoint_is_named(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a model with head 'scalar', expected 'lm'"):
        PPOJob(
            load_config(PPOConfig, {**actor_settings(models), "model": {"restore_from_path": models.rm}}),
            a_run(tmp_path),
        )
    with pytest.raises(ConfigError, match="holds a model with head 'lm', expected 'scalar'"):
        RewardModel(ModelSetup(restore_from_path=models.sft))


def test_a_reward_model_whose_scores_are_all_equal_is_named(models: Models, tmp_path: Path) -> None:
    constant = shutil.copytree(models.rm, tmp_path / "constant")
    manifest = json.loads((constant / "manifest.json").read_text())
    manifest["state"]["std"] = 0.0
    (constant / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"^model: .*constant.* has a standard deviation of 0\.0: expected above 0$"):
        RewardModel(ModelSetup(restore_from_path=constant))


def test_a_truncated_checkpoint_is_named(models: Models, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(models.sft, damaged)
    victim = max((damaged / "weights").iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"is damaged: weights/{victim.name} has .* bytes, its manifest says"):
        checkpoint_files.read_manifest(damaged)
    shutil.rmtree(damaged)
    shutil.copytree(models.sft, damaged)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ConfigError, match=f"the content of weights/{victim.name}"):
        checkpoint_files.verify(damaged)


def test_training_jobs_check_their_data_first(models: Models, tmp_path: Path) -> None:
    data = {"train": models.data / "sft.train.jsonl", "validation": models.data / "sft.validation.jsonl"}
    common = {"model": {"restore_from_path": models.sft}, "fit": {"global_batch_size": 4}, "optimizer": {"lr": 1e-5}}
    wrong = load_config(RewardTrainingConfig, {**common, "data": data})
    with pytest.raises(ConfigError, match="chosen"):
        train_reward_model(wrong, a_run(tmp_path))
    same = {"train": data["train"], "validation": data["train"]}
    with pytest.raises(ConfigError, match="the same file"):
        load_config(SFTConfig, {**common, "data": same})
    short = load_config(SFTConfig, {**common, "data": {**data, "max_sequence_length": 8}})
    with pytest.raises(ConfigError, match="max_sequence_length = 8"):
        train_sft(short, a_run(tmp_path))
