"""NeMo-Aligner's settings files become ours: no key is passed over, and what comes out loads."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from aligner_files import ACTOR, CRITIC, FILES, REWARD_SERVER, REWARD_TRAINING, SFT
from aligner_key_names import KEY_NAMES
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_eppo.cli import main
from nemo_eppo.config import Config, ConfigError, config_types, load_config
from nemo_eppo.entry.settings import nested
from nemo_eppo.settings.critic import CriticConfig
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reward_model import RewardServerConfig, RewardTrainingConfig
from nemo_eppo.settings.training import SFTConfig
from nemo_eppo.tools.aligner_cli import check, render_report
from nemo_eppo.tools.aligner_config import convert
from nemo_eppo.tools.aligner_jobs import JOBS
from nemo_eppo.tools.aligner_rules import Conversion
from nemo_eppo.training.reward_model import RewardTask
from nemo_eppo.training.sft import SFTTask

CONF = Path(__file__).parents[2] / "conf"
SCHEMAS: dict[str, type[Config]] = {
    "ppo-actor": PPOConfig,
    "ppo-critic": CriticConfig,
    "reward-server": RewardServerConfig,
    "reward-training": RewardTrainingConfig,
    "sft": SFTConfig,
}


def converted(values: dict[str, Any], tmp_path: Path, **changes: Any) -> Conversion:
    """Of a file with `values`, `changes` made to dotted keys (written with __)."""
    config = OmegaConf.create(yaml.safe_dump(values))
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    (tmp_path / "theirs.yaml").write_text(OmegaConf.to_yaml(config))
    return convert(tmp_path / "theirs.yaml")


def status(result: Conversion, key: str) -> str:
    (row,) = [row for row in result.rows if row.key == key]
    return row.status


@pytest.mark.parametrize("kind", JOBS)
def test_every_key_of_that_project_is_mapped_or_listed_with_a_reason(kind: str, tmp_path: Path) -> None:
    rules = JOBS[kind].rules
    filled = {name: rules[name].default if name in rules else None for name in KEY_NAMES[kind]}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(nested(filled)))
    result = convert(tmp_path / "theirs.yaml", kind)
    reported = {row.key: row for row in result.rows}
    for name in KEY_NAMES[kind]:
        assert reported[name].status != "unknown", name
        assert reported[name].target or reported[name].note, f"{name} has neither a target nor a reason"
    check(result)


@pytest.mark.parametrize("kind", JOBS)
def test_every_target_is_a_key_of_our_schema(kind: str) -> None:
    targets = {target for rule in JOBS[kind].rules.values() for target in rule.target.split(", ") if target}
    for target in targets:
        schema: type[Config] | None = SCHEMAS[kind]
        for name in target.split("."):
            assert schema is not None, target
            assert name in schema.model_fields, target
            schema = next(iter(config_types(schema.model_fields[name].annotation)), None)


@pytest.mark.parametrize("kind", JOBS)
def test_the_output_runs_through_our_command_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "new" / "ours.yaml"
    theirs.write_text(yaml.safe_dump(FILES[kind]))
    assert main(["convert", "aligner-config", str(theirs), "--output", str(ours), "--strict"]) == 0
    assert f"theirs.yaml: {kind}" in capsys.readouterr().err
    assert ours.read_text().startswith("# Settings of ")
    with initialize_config_dir(str(ours.parent), version_base="1.3"):
        composed = compose("ours", [f"hydra.searchpath=['file://{CONF}']"])
    load_config(SCHEMAS[kind], OmegaConf.to_container(composed))  # type: ignore[arg-type]
    assert main(["convert", "aligner-config", str(theirs), "--output", str(ours)]) == 2, "never overwritten"


def test_values_of_the_actor(tmp_path: Path) -> None:
    result = converted(ACTOR, tmp_path)
    ours = result.values
    assert {
        "ppo.max_steps": 300,
        "ppo.rollout_batch_size": 96,
        "ppo.mini_batch_size": 48,
        "ppo.epochs": 1,
        "ppo.advantages.gamma": 0.99,
        "ppo.advantages.lam": 0.9,
        "ppo.advantages.whiten": False,
        "ppo.clip_low": 0.15,
        "ppo.clip_high": 0.15,
        "ppo.entropy_coefficient": 0.01,
        "shaping.kl.coefficient": 0.02,
        "shaping.kl.estimator": "k1",
        "shaping.clip.range": None,
        "generation.max_new_tokens": 512,
        "engine.max_batch_size": 12,
        "generation.temperature": 0.8,
        "generation.top_k": 50,
        "generation.top_p": 1.0,
        "generation.repetition_penalty": 1.2,
        "generation.stop_strings": ["<|endoftext|>", "\nUser:"],
        "generation.min_new_tokens": 5,
        "data.max_prompt_length": 1536,
        "data.train": "/d/train.jsonl",
        "model.restore_from_path": "/models/sft_megatron",
        "model.precision": "bf16",
        "model.micro_batch_size": 3,
        "model.recompute": True,
        "model.parallel.tensor_model_parallel_size": 2,
        "model.parallel.sequence_parallel": True,
        "optimizer.lr": 3e-7,
        "optimizer.min_lr": 3e-8,
        "optimizer.betas": [0.8, 0.9],
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 5,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_grad": 0.5,
        "validation.interval": 7,
        "validation.max_prompts": 96,
        "checkpoint.interval": 7,
        "checkpoint.best": "validation/proxy_reward",
        "checkpoint.best_is": "highest",
        "exp_manager.max_time_per_run": "00:03:30:00",
        "seed": 99,
        "exp_manager.explicit_log_dir": "/results/actor/ppo_actor",
        "exp_manager.wandb_logger_kwargs": {"project": "p", "name": "n"},
        "critic.server.url": "grpc://localhost:5601",
        "rewards": [{"server": {"url": "grpc://node7:5600"}, "mean": 0.0, "std": 1.0}],
    }.items() <= ours.items()
    assert status(result, "trainer.ppo.trt_llm.enable") == "dropped"
    assert status(result, "exp_manager.checkpoint_callback_params.save_top_k") == "changed"
    assert ours["optimizer.distributed"] is True
    assert status(result, "model.optim.weight_decay") == "default"
    assert status(result, "exp_manager.checkpoint_callback_params.model_parallel_size") == "dropped"
    assert any("nemo-eppo prepare prompts --input /d/train.jsonl" in line for line in result.todo)
    assert any("node7 and the actor need certificates" in line for line in result.todo)
    loaded = check(result)
    assert isinstance(loaded, PPOConfig)
    assert loaded.rewards[0].server is not None
    assert loaded.rewards[0].server.job == "reward"


def test_a_combined_server_serves_rewards_from_the_critics_job(tmp_path: Path) -> None:
    actor = converted(ACTOR, tmp_path, remote_critic_rm__combine_rm_and_critic_server=True)
    assert actor.values["rewards"][0]["server"] == {"url": "grpc://localhost:5601", "job": "critic"}
    critic = converted(CRITIC, tmp_path)
    assert critic.values["reward_model"] == critic.values["model.restore_from_path"] == "/models/rm_megatron"
    assert any(line.startswith("nemo-eppo convert nemo-to-megatron --input /models/rm.nemo") for line in critic.todo)
    assert {"server.port": 5601, "optimizer.decay_steps": 600, "value_clip": 0.3}.items() <= critic.values.items()
    assert any("set mean: 1.5 and std: 2.5 in the actor's rewards" in line for line in critic.todo)
    sized = converted(CRITIC, tmp_path, model__global_batch_size=24)
    assert any("global_batch_size = 24 of this file has to be its ppo.mini_batch_size" in line for line in sized.todo)
    alone = converted(CRITIC, tmp_path, trainer__ppo__combine_rm_and_critic_server=False)
    assert alone.values["reward_model"] is None


def test_jobs_that_share_a_directory_there_have_one_each(tmp_path: Path) -> None:
    directories = set()
    for values in (ACTOR, CRITIC, REWARD_TRAINING, SFT):
        result = converted(values, tmp_path, exp_manager__explicit_log_dir="/results")  # as in NeMo-Aligner's files
        assert status(result, "exp_manager.explicit_log_dir") == "changed"
        loaded: Any = check(result)
        directories.add(str(loaded.exp_manager.directory))
    assert directories == {f"/results/{job}" for job in ("ppo_actor", "ppo_critic", "reward_training", "sft")}
    unset = converted(CRITIC, tmp_path, exp_manager__explicit_log_dir=None)
    assert "exp_manager.explicit_log_dir" not in unset.values


def test_values_of_the_other_jobs(tmp_path: Path) -> None:
    server = converted(REWARD_SERVER, tmp_path).values
    assert {"server.port": 5600, "model.precision": "fp32", "model.micro_batch_size": 8}.items() <= server.items()
    training = converted(REWARD_TRAINING, tmp_path).values
    assert {
        "fit.epochs": 2,
        "fit.validation_interval": 50,
        "checkpoint.interval": 200,
        "fit.global_batch_size": 32,
        "data.max_sequence_length": 1024,
        "optimizer.lr": 9e-6,
    }.items() <= training.items()
    sft = converted(SFT, tmp_path)
    assert {
        "fit.max_steps": 500,
        "fit.global_batch_size": 16,
        "data.max_sequence_length": 512,
        "data.validation": "/d/val.jsonl",
        "checkpoint.best": "validation/loss",
        "checkpoint.best_is": "lowest",
        "optimizer.lr": 3e-5,
    }.items() <= sft.values.items()
    assert "fit.max_steps" not in training
    assert "fit.epochs" not in sft.values, "max_steps alone decides, where NeMo-Aligner takes the smaller of both"
    assert "ends after 1 epochs already" in sft.notes["fit.max_steps"]
    assert status(converted(SFT, tmp_path, trainer__sft__max_epochs=3), "trainer.sft.max_epochs") == "changed"
    assert sft.values["checkpoint.best"] in SFTTask.validated
    assert training["checkpoint.best"] in RewardTask.validated
    assert status(sft, "model.hidden_dropout") == "lost"
    assert status(sft, "trainer.sft.val_check_interval") == "changed", "a share of an epoch is no number of steps"


@pytest.mark.parametrize(
    ("steps", "ours", "conflict"),
    [(-1, 100, False), (500, 100, False), (112, 100, False), (111, 100, False), (110, 99, True), (5, 0, True)],
)
def test_constant_steps_end_the_schedule_as_there(steps: int, ours: int, conflict: bool, tmp_path: Path) -> None:
    result = converted(SFT, tmp_path, trainer__sft__max_steps=steps, model__optim__sched__constant_steps=100)
    assert result.values["optimizer.constant_steps"] == ours
    key = "model.optim.sched.constant_steps"
    assert any(row.status == "conflict" for row in result.rows if row.key == key) == conflict
    check(result)
    constant = converted(SFT, tmp_path, model__optim__sched={"name": None, "constant_steps": 100})
    assert status(constant, key) == "dropped"
    assert "optimizer.constant_steps" not in constant.values


def test_constant_steps_count_the_updates_of_each_job(tmp_path: Path) -> None:
    sched = {"name": "CosineAnnealing", "warmup_steps": 10, "constant_steps": 1000, "min_lr": 1e-9}
    actor = converted(ACTOR, tmp_path, model__optim__sched=sched)  # 300 steps of two updates
    assert actor.values["optimizer.constant_steps"] == 300 * 2 - 10 - 1
    critic = converted(CRITIC, tmp_path, model__optim__sched=sched)
    assert critic.values["optimizer.constant_steps"] == 600 - 10 - 1
    for endless in (
        converted(ACTOR, tmp_path, model__optim__sched=sched, trainer__ppo__max_steps=-1),
        converted(CRITIC, tmp_path, model__optim__sched=sched, trainer__ppo__max_steps=-1),
    ):
        assert endless.values["optimizer.constant_steps"] == 1000
        check(endless)


def test_sft_learns_the_responses_alone_whatever_the_file_says_as_there(tmp_path: Path) -> None:
    for value, said in ((True, "mapped"), (False, "changed")):
        result = converted(SFT, tmp_path, model__answer_only_loss=value)
        assert (result.values["answer_only_loss"], status(result, "model.answer_only_loss")) == (True, said)


def test_a_layout_that_comes_with_the_checkpoint_has_to_be_given(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(REWARD_SERVER | {"model": {}}))
    result = convert(tmp_path / "theirs.yaml")
    assert any("NeMo-Aligner takes from the .nemo file" in line for line in result.todo)
    whole = converted(ACTOR, tmp_path, model__pipeline_model_parallel_size=1)
    assert not any(".nemo file" in line for line in whole.todo)


def test_adapters_are_those_of_that_project(tmp_path: Path) -> None:
    tuning = {"target_modules": ["mlp_fc2", "attention"], "adapter_dim": 8}
    result = converted(ACTOR, tmp_path, model__peft={"peft_scheme": "lora", "lora_tuning": tuning})
    check(result)
    assert {key: value for key, value in result.values.items() if key.startswith("model.lora")} == {
        "model.lora.rank": 8,
        "model.lora.alpha": 8.0,  # adapters are scaled by alpha / rank, there by 1 unless alpha is set
        "model.lora.targets": ["linear_qkv", "linear_proj", "linear_fc2"],
    }
    assert converted(ACTOR, tmp_path, model__peft__peft_scheme="none").values["model.lora"] is None


def test_an_endless_run_has_to_be_given_its_steps(tmp_path: Path) -> None:
    result = converted(ACTOR, tmp_path, trainer__ppo__max_steps=-1)
    assert result.values["ppo.max_steps"] == "???"
    assert any("ppo.max_steps: 2 x (number of prompts // 96)" in line for line in result.todo)


def test_contradictions_are_reported(tmp_path: Path) -> None:
    result = converted(ACTOR, tmp_path, model__tensor_model_parallel_size=1, model__precision="32")
    conflicts = {row.key for row in result.rows if row.status == "conflict"}
    assert conflicts == {"model.sequence_parallel", "model.precision"}
    assert result.values["model.parallel.sequence_parallel"] is False


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("model__ppo__num_rollout_samples", 100, "model.ppo.num_rollout_samples = 100: not divisible"),
        ("model__ppo__sampling_params__use_greedy", True, "model.ppo.sampling_params.use_greedy = True: PPO samples"),
        ("model__ppo__length_params__max_length", 4096, "leaves no room for a prompt in a window of 2048"),
        (
            "model__ppo__sampling_params__end_strings",
            "x",
            "model.ppo.sampling_params.end_strings = 'x': expected",
        ),
        ("model__optim__name", "sgd", "model.optim.name = 'sgd': the optimizer is AdamW"),
        ("model__optim__sched__min_lr", 1.0, "model.optim.sched.min_lr = 1.0: above model.optim.lr"),
        ("model__optim__lr", "fast", "model.optim.lr = 'fast'"),
        ("model__peft__peft_scheme", "ptuning", "model.peft.peft_scheme = 'ptuning': expected lora or none"),
        ("model__seed", "${model.nowhere}", "refers to a key or variable that neither file nor environment has"),
        ("model__global_batch_size", None, "model.global_batch_size = None: expected a whole number"),
        ("model__data__seq_length", "???", "model.data.seq_length = '???': expected a whole number"),
        ("model__ppo__length_params__max_length", 2.5, "max_length = 2.5: expected a whole number"),
        ("model__ppo__ratio_eps", "x", "model.ppo.ratio_eps = 'x': expected a number"),
        ("remote_critic_rm__critic__ip", None, "remote_critic_rm.critic.ip = None: expected a host name"),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(key: str, value: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        converted(ACTOR, tmp_path, **{key: value})
    assert complaint in str(error.value)


def test_unknown_keys_are_listed_and_strict_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = converted(ACTOR, tmp_path, trainer__ppo__gae_lamda=0.5)
    assert status(result, "trainer.ppo.gae_lamda") == "unknown"
    assert result.values["ppo.advantages.lam"] == 0.9
    arguments = ["convert", "aligner-config", str(tmp_path / "theirs.yaml")]
    assert main([*arguments, "--strict"]) == 2
    assert "trainer.ppo.gae_lamda" in capsys.readouterr().err
    assert main(arguments) == 0
    settings, report = capsys.readouterr()
    assert yaml.safe_load(settings)["ppo"]["advantages"]["lam"] == 0.9
    assert "unknown (no keys of NeMo-Aligner): 1\n  trainer.ppo.gae_lamda = 0.5" in report


def test_what_is_left_to_do_comes_first(tmp_path: Path) -> None:
    report = render_report(converted(SFT, tmp_path), Path("theirs.yaml"))
    headings = [line.partition(" (")[0] for line in report.splitlines()[1:] if line and not line.startswith(" ")]
    assert headings == ["to do by hand:", "lost", "changed", "dropped", "default", "mapped"]
    assert report.splitlines()[3].startswith("  - nemo-eppo convert nemo-to-megatron --input /models/base.nemo")


def test_an_sft_file_with_settings_of_generation_is_no_server_s(tmp_path: Path) -> None:
    assert converted(SFT | {"inference": {"greedy": True}}, tmp_path).kind == "sft"


def test_files_of_other_algorithms_are_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it looks like one for dpo"):
        converted({"trainer": {"dpo": {"max_steps": 1}}}, tmp_path)


@pytest.mark.parametrize(("theirs", "alone"), [(0, 0), (1, 0), (4, 3)])
def test_a_critic_that_warms_up_makes_as_many_rollouts_before_the_policy_learns(
    theirs: int, alone: int, tmp_path: Path
) -> None:
    values = converted(ACTOR, tmp_path, trainer__ppo__critic_warmup_steps=theirs).values
    assert values.get("ppo.critic_warmup_steps", 0) == alone
    assert values["ppo.max_steps"] == 300 + alone  # the policy's own steps are as many
