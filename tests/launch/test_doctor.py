"""`nemo-eppo doctor` finds each planted fault, says how to mend it, and passes what is sound."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import free_port
from jobs import Models

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.entry.settings import as_yaml
from nemo_eppo.launch import machine_checks
from nemo_eppo.launch.examination import check_launch, examine
from nemo_eppo.launch.job import job_settings
from nemo_eppo.launch.launch_file import read_launch
from nemo_eppo.models import checkpoint_files
from nemo_eppo.servers.client import RewardClient
from nemo_eppo.settings.servers import ClientConfig

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def launch(models: Models, tmp_path: Path) -> Path:
    """A launch file without a fault."""
    rewards = {"model.restore_from_path": str(models.rm)}
    content = {
        "name": "sound",
        "output": str(tmp_path / "run"),
        "jobs": {
            "critic": {"script": "serve_ppo_critic", "settings": {**rewards}},
            "reward": {"script": "serve_reward_model", "settings": {**rewards}},
            "actor": {
                "script": "train_gpt_ppo_actor",
                "needs": ["critic", "reward"],
                "ranks_per_node": 2,
                "settings": {
                    "model": {
                        "restore_from_path": str(models.sft),
                        "parallel": {"tensor_model_parallel_size": 2},
                    },
                    "data": {"train": str(models.data / "prompts.train.jsonl"), "max_prompt_length": 16},
                    "generation": {"max_new_tokens": 20},
                    "ppo": {"max_steps": 3, "rollout_batch_size": 8, "mini_batch_size": 4},
                },
            },
        },
    }
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


Report = tuple[int, dict[str, Any]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; its exit status, and its findings by name of the check."""

    def run(*arguments: str | Path) -> Report:
        try:
            status = main(["doctor", *map(str, arguments), "--json"])
        except SystemExit as end:
            status = int(end.code or 0)
        report = json.loads(capsys.readouterr().out)
        faults = [finding for finding in report["findings"] if finding["status"] == "error"]
        assert len(faults) == report["errors"]
        assert all(finding["mend"] for finding in faults)
        return status, {finding["check"]: finding for finding in report["findings"]}

    return run


@pytest.fixture
def reward_server(reward_url: str) -> str:
    """The address of a reward server that answers."""
    client = RewardClient(ClientConfig(url=reward_url, connect_timeout=60))
    client.connect({})
    client.close()
    return reward_url


def only_error(report: Report, check: str) -> str:
    status, findings = report
    assert status == 1
    assert [name for name, finding in findings.items() if finding["status"] == "error"] == [check]
    found: str = findings[check]["found"]
    return found


def test_a_sound_launch_passes(launch: Path, doctor: Any, models: Models) -> None:
    status, findings = doctor(launch)
    assert status == 0
    assert findings["actor: layout"]["found"].startswith("2 ranks = TP 2 x PP 1 x DP 1 for 4 layers")
    rows = len((models.data / "prompts.train.jsonl").read_text().splitlines())
    assert findings["actor: data.train"]["found"].endswith(f": {rows} rows")
    for check in ("critic: tokenizer", "reward: window", "actor: memory", "disk", "memory of the machine"):
        assert findings[check]["status"] == "ok", check


def test_the_command_prints_a_table_and_exits_by_what_it_found(
    launch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(launch)]) == 0
    assert " 0 errors, " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", str(launch), "jobs.actor.ranks_per_node=3"])
    assert "world size 3 is not divisible by tensor_model_parallel_size 2" in " ".join(capsys.readouterr().out.split())


def test_a_machine_without_gpus_is_examined_without_torch() -> None:
    """Its import takes seconds."""
    code = "import sys; from nemo_eppo.cli import main; main(['doctor']); print('torch' in sys.modules)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("script", "found"),
    [("#!/bin/sh\necho 1.2.1", "1.2.1 in {}"), ("#!/bin/sh\nexit 1", "not installed in {}"), (None, "No such file")],
    ids=["there", "not there", "no Python"],
)
def test_tensorrt_llm_is_looked_for_where_engines_would_run(
    script: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(script)
        python.chmod(0o755)
    monkeypatch.setenv("NEMO_EPPO_TENSORRT_LLM_PYTHON", str(python))
    [finding] = [finding for finding in machine_checks.packages() if finding.check == "optional tensorrt_llm"]
    assert found.format(python) in finding.found
    assert finding.status == ("ok" if script else "warning")


def with_free_tokenizer(model: Path, copy: Path) -> Path:
    """A copy of a checkpoint whose tokenizer can be changed."""
    shutil.copytree(model, copy)
    manifest = json.loads((copy / checkpoint_files.MANIFEST).read_text())
    manifest["files"] = {k: v for k, v in manifest["files"].items() if not k.startswith(checkpoint_files.TOKENIZER)}
    (copy / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("key", ["eos_token", "chat_template"])
def test_another_eos_is_an_error_and_another_chat_template_a_warning(
    key: str, launch: Path, doctor: Any, models: Models, tmp_path: Path
) -> None:
    other = with_free_tokenizer(models.rm, tmp_path / "other")
    settings = other / checkpoint_files.TOKENIZER / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {key: "<pad>"}))
    status, findings = doctor(launch, f"jobs.reward.settings.model.restore_from_path={other}")
    found = findings["reward: tokenizer"]
    if key == "eos_token":
        assert (status, found["status"]) == (1, "error")
        assert "EOS 1, actor has 0" in found["found"]
    else:
        assert (status, found["status"]) == (0, "warning")
        assert found["found"] == "another chat template than actor's"


def test_a_smaller_model_of_the_same_tokenizer_is_a_warning(
    launch: Path, doctor: Any, models: Models, tmp_path: Path
) -> None:
    """As of Qwen2.5, whose models of 0.5B and 7B have 151936 and 152064 rows for one tokenizer of 151665."""
    other = with_free_tokenizer(models.sft, tmp_path / "other")
    manifest = json.loads((other / checkpoint_files.MANIFEST).read_text())
    manifest["model"]["vocab_size"] = 70
    (other / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
    status, findings = doctor(launch, f"jobs.actor.settings.model.restore_from_path={other}")
    assert (status, findings["reward: tokenizer"]["status"]) == (0, "warning")
    assert findings["reward: tokenizer"]["found"] == "a vocabulary of 64, actor's model has 70"


def test_another_vocabulary(launch: Path, doctor: Any, models: Models, tmp_path: Path) -> None:
    other = with_free_tokenizer(models.rm, tmp_path / "other")
    shutil.rmtree(other / checkpoint_files.TOKENIZER)
    word_level([f"w{n}" for n in range(40)], other / checkpoint_files.TOKENIZER)
    report = doctor(launch, f"jobs.reward.settings.model.restore_from_path={other}")
    assert "vocabulary of 42, actor has 64" in only_error(report, "reward: tokenizer")


def test_fewer_gpus_than_ranks(launch: Path, doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    found = only_error(doctor(launch), "GPUs of the jobs")
    assert "actor, critic, reward run together on 4 ranks, but there are 3 GPUs" in found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    status, findings = doctor(launch)
    assert status == 0
    assert findings["GPUs"]["status"] == "warning"  # torch has another opinion of this machine
    assert "4 here, torch" in findings["GPUs"]["found"]


def test_fewer_rows_than_a_batch(launch: Path, doctor: Any, models: Models) -> None:
    found = only_error(doctor(launch, "jobs.actor.settings.ppo.rollout_batch_size=64"), "actor: data.train")
    assert found == f"{models.data / 'prompts.train.jsonl'}: 32 rows"


def test_a_dead_server_and_one_that_does_not_fit(launch: Path, doctor: Any, reward_server: str) -> None:
    dead = f"grpc://127.0.0.1:{free_port()}"
    report = doctor(launch, "--server", reward_server, "--server", dead)
    assert "unavailable for status" in only_error(report, f"server {dead}")
    alive = report[1][f"server {reward_server}"]["found"]
    assert alive == "reward, protocol 2, 0 updates, up to 48 tokens a sequence, 64 in the vocabulary"


def test_no_space(launch: Path, doctor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage

    def full(path: Any) -> Any:
        return usage(path) if str(path) == "/dev/shm" else Usage(2**30, 2**30 - 1000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", full)
    assert f"0.0 GiB free at {tmp_path}" in only_error(doctor(launch), "disk")


def test_an_unknown_key(launch: Path, doctor: Any) -> None:
    found = only_error(doctor(launch, "jobs.actor.settings.ppo.epoch=2"), "actor: settings and model")
    assert "ppo.epoch: unknown key" in found
    found = only_error(doctor(launch, "jobs.actor.nodez=2"), "launch file")
    assert "jobs.actor.nodez: unknown key" in found


def test_missing_and_malformed_files(launch: Path, doctor: Any, models: Models, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.jsonl"
    malformed = tmp_path / "malformed.jsonl"
    malformed.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    report = doctor(launch, f"jobs.actor.settings.data.train={malformed}")
    assert f"{malformed}:2" in only_error(report, "actor: data.train")
    status, findings = doctor(
        launch, f"jobs.actor.settings.data.train={nowhere}", "jobs.actor.settings.model.restore_from_path=/nowhere/sft"
    )
    assert status == 1
    assert "/nowhere/sft" in findings["actor: settings and model"]["found"]
    assert str(nowhere) in findings["actor: data.train"]["found"]


def test_rows_that_a_job_would_refuse_after_the_jobs_before_it(launch: Path, doctor: Any) -> None:
    limit = "jobs.actor.settings.data.max_prompt_length=3"
    found = only_error(doctor(launch, limit), "actor: data.train")
    assert "prompts.train.jsonl:1: " in found
    assert "but max_prompt_length = 3; shorten it, raise the limit, or set data.too_long to 'drop'" in found


def test_a_run_that_does_not_go_on_with_these_settings(launch: Path, doctor: Any) -> None:
    config = read_launch(launch)
    run = config.output / "actor"
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "config.yaml").write_text(as_yaml(job_settings(config, "actor")))
    assert doctor(launch, "jobs.actor.settings.ppo.max_steps=9")[0] == 0
    report = doctor(launch, "jobs.actor.settings.shaping.energy_penalty.eta=9")
    found = only_error(report, "actor: settings and model")
    assert "holds a run that was started with other settings:\n  - shaping.energy_penalty.eta was" in found
    change = "jobs.actor.settings.exp_manager.may_change=[shaping.energy_penalty.eta]"
    assert f"accept them with '{change}'" in found
    assert doctor(launch, "jobs.actor.settings.shaping.energy_penalty.eta=9", change)[0] == 0


def test_faults_do_not_hide_each_other(launch: Path, doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "_OPEN_FILES", 10**9)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    status, findings = doctor(
        launch,
        "jobs.actor.settings.ppo.epoch=2",
        "jobs.critic.settings.server.port=5001",
        "jobs.reward.settings.server.port=5001",
        "jobs.reward.settings.model.parallel.tensor_model_parallel_size=2",
    )
    assert status == 1
    faulty = {name for name, finding in findings.items() if finding["status"] != "ok"}
    assert {"Python", "open files", "actor: settings and model", "reward: settings and model", "ports"} <= faulty
    assert findings["critic: layout"]["status"] == "ok"


def test_whatever_launch_refuses_doctor_names(launch: Path, doctor: Any, tmp_path: Path) -> None:
    changes = [
        "jobs.reward.nodes=2",
        "jobs.critic.settings.server.port=5001",
        "jobs.reward.settings.server.port=5001",
        "jobs.critic.settings.model.restore_from_path=/nowhere/rm",
        "jobs.reward.settings.model.parallel.tensor_model_parallel_size=3",
        f"jobs.actor.settings.data.validation={tmp_path / 'run' / 'reward' / 'rows.jsonl'}",
        "jobs.actor.needs=[critic]",
    ]
    with pytest.raises(ConfigError) as refused:
        check_launch(read_launch(launch, changes), here=True)
    _, findings = doctor(launch, *changes)
    errors = {finding["found"] for finding in findings.values() if finding["status"] == "error"}
    faults = str(refused.value).splitlines()
    assert len(faults) == 6
    for fault in faults:
        assert any(fault.endswith(found) for found in errors), fault


def test_a_window_that_is_too_short(launch: Path, doctor: Any) -> None:
    status, findings = doctor(launch, "jobs.actor.settings.generation.max_new_tokens=40")
    assert status == 1
    assert "56 tokens of prompt and response, a window of 48" in findings["reward: window"]["found"]
    assert "max_new_tokens 40 is more than the model's window" in findings["actor: settings and model"]["found"]
    assert findings["actor: memory"]["status"] == "ok"


def test_memory_that_no_gpu_has(launch: Path, doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_eppo.megatron.device.capacities", lambda: [2**20])
    status, findings = doctor(launch)
    assert status == 1
    assert "a GPU has 0" in findings["actor: memory"]["found"]


def test_null_is_what_suits_the_devices_on_which_a_job_will_run(launch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpus, on_gpus = ("fp32", False, False), ("bf16", None, True)  # sharded if there are replicas
    hidden = "jobs.critic.environment.CUDA_VISIBLE_DEVICES=''"

    def chosen(*overrides: str, here: bool = True) -> tuple[str, bool | None, bool]:
        _, jobs = examine(read_launch(launch, overrides), here=here, files=False)
        [settings] = [job.settings for job in jobs if job.name == "critic"]
        optimizer = settings.optimizer
        return settings.model.precision, optimizer.distributed, optimizer.overlap_grad_reduce

    for gpus, found in (("", on_cpus), ("0,1", on_gpus)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        assert (chosen(), chosen(hidden), chosen("slurm.image=nemo.sqsh", here=False)) == (found, on_cpus, on_gpus)
        assert chosen("slurm.image=nemo.sqsh") == found, "a file for a cluster may run on this machine"
    keys = {"model.precision": "fp32", "optimizer.distributed": "false", "optimizer.overlap_grad_reduce": "false"}
    assert chosen(*(f"jobs.critic.settings.{key}={value}" for key, value in keys.items())) == on_cpus


def test_settings_that_are_slow_on_gpus_alone(launch: Path, doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [check for check in doctor(launch)[1] if check.endswith("speed")]
    monkeypatch.setattr("nemo_eppo.megatron.device.capacities", lambda: [2**40] * 4)
    model, critic = "jobs.actor.settings.model", "jobs.critic"
    replicas = (f"{critic}.ranks_per_node=2", f"{critic}.settings.optimizer.overlap_grad_reduce=false")
    slow = (f"{critic}.settings.model.precision=fp32", f"{critic}.settings.optimizer.distributed=false")
    findings = doctor(launch, f"{model}.precision=bf16", f"{model}.micro_batch_tokens=64", *replicas, *slow)[1]
    assert "actor: speed" not in findings
    assert findings["actor: CUDA graphs"]["status"] == "ok", "nobody has run them on a GPU"
    assert "run.sh --only decoder" in findings["actor: CUDA graphs"]["found"]
    found = findings["critic: speed"]
    assert (found["status"], found["mend"][:9]) == ("warning", "set bf16,")
    assert found["found"] == (
        "slow on GPUs: model.precision = fp32, model.micro_batch_tokens = null, optimizer.distributed = false, "
        "optimizer.overlap_grad_reduce = false"
    )


def test_a_server_that_is_another_protocol(doctor: Any, reward_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_eppo.launch.server_checks.PROTOCOL_VERSION", 3)
    assert only_error(doctor("--server", reward_server), f"server {reward_server}") == "protocol 2"
