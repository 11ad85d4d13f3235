"""The entry of job scripts: command line, errors, run directory; NeMo itself on rank 0."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_eppo.config import Config, ConfigError, load_config
from nemo_eppo.entry.job import errors_end_the_job, job
from nemo_eppo.megatron.collectives import PeerError
from nemo_eppo.observability.report_tables import VERSIONS, read_config
from nemo_eppo.rewards.functions import RewardFunctionError
from nemo_eppo.servers.client import ServerUnavailable
from nemo_eppo.servers.protocol import ServiceError
from nemo_eppo.settings.kinds import KINDS
from nemo_eppo.settings.run import ExpManagerConfig

REPOSITORY = Path(__file__).parents[2]
_SCRIPT = '''
"""Counts to a number.

Not very useful."""

import atexit, json, os, signal, sys
from typing import Literal
from pydantic import Field
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.run import ExpManagerConfig

HEAVY = {"nemo", "torch", "megatron", "lightning"}
if "pytest" not in sys.modules:
    atexit.register(lambda: print("heavy imports:", sorted(HEAVY & sys.modules.keys())))


class ModelConfig(Config):
    """The thing that counts."""

    hidden_size: int = Field(64, gt=0)
    """Width of the thing."""
    path: str
    """Where the thing comes from."""


class CountConfig(Config):
    """All settings."""

    steps: int = 10
    """How far to count."""
    mode: Literal["up", "down"] = "up"
    """Which way."""
    model: ModelConfig
    extra: dict[str, ModelConfig] = {}
    """More things by name."""
    exp_manager: ExpManagerConfig = ExpManagerConfig()


@job(CountConfig, config_name="count", config_path="conf")
def main(config: CountConfig, run: Run) -> None:
    if config.steps == 13:
        raise ConfigError("steps = 13: an unlucky number")
    if config.steps == 14:
        raise KeyError("a mistake in the code")
    run.logger.info("counting")
    if run.rank == 0:
        with run.open_metrics(resume_step=config.steps - 1) as metrics:
            metrics.log(config.steps, {"count": float(config.steps)})
    facts = {
        "config": config.model_dump(mode="json"),
        "directory": str(run.directory),
        "cwd": os.getcwd(),
        "captured_signals": [s.name for s in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(s) != signal.SIG_DFL],
        "nemo": "nemo" in sys.modules,
    }
    with open(os.environ["FACTS"], "w") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main()
'''
_YAML = """
steps: 5
model:
  path: ???
  hidden_size: ${oc.env:WIDTH,32}
exp_manager:
  explicit_log_dir: run
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("job")
    (directory / "conf").mkdir()
    (directory / "conf" / "count.yaml").write_text(_YAML)
    (directory / "count.py").write_text(_SCRIPT)
    return directory / "count.py"


def _run(script: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of the script in a process of its own."""
    done = subprocess.run(
        [sys.executable, script.name, *arguments],
        cwd=script.parent,
        env={**os.environ, "COLUMNS": "100", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_an_unknown_key_is_one_message_and_costs_no_heavy_import(script: Path) -> None:
    status, output = _run(script, "model.path=x", "model.hiden_size=3", "stepz=1")
    assert status == 2
    assert output.splitlines() == [
        "invalid configuration:",
        "  - model.hiden_size: unknown key (did you mean 'hidden_size'?)",
        "  - stepz: unknown key (did you mean 'steps'?)",
        "heavy imports: []",
    ]


def test_help_teaches_every_setting(script: Path) -> None:
    status, output = _run(script, "--help", "steps=7")
    assert status == 0
    assert output.startswith("usage: python count.py [KEY=VALUE ...]")
    assert "Counts to a number.\n\nNot very useful." in output
    assert "  steps = 7\n      How far to count.\n" in output
    assert "  mode = up\n      Which way. One of: up, down.\n" in output
    assert "[model] The thing that counts.\n  model.hidden_size = " in output
    assert "  model.path = (required)\n      Where the thing comes from.\n" in output
    assert "  extra.<name>.hidden_size = 64\n      Width of the thing.\n" in output
    assert "  exp_manager.explicit_log_dir = run\n" in output
    assert "python count.py exp_manager.explicit_log_dir=runs/first" in output
    assert "heavy imports: []" in output


# The rest of the command line is tried in this process, as rank 1, which leaves NeMo alone.


def _as_rank_1(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("FACTS", str(script.parent / "facts.json"))
    monkeypatch.setattr(
        "nemo_eppo.entry.job.time.sleep", lambda seconds: print(f"waited {seconds:g} s", file=sys.stderr)
    )
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_cfg_prints_the_checked_settings(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cfg", "job", "model.path=a/b c", "mode=down", "extra.a.path=z", "exp_manager.name=null"]
    assert _as_rank_1(script, monkeypatch, *arguments[:-1]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["steps"] == 5  # YAML
    assert printed["mode"] == "down"  # command line, not in the YAML file
    assert printed["model"] == {"hidden_size": 32, "path": "a/b c"}
    assert printed["extra"] == {"a": {"hidden_size": 64, "path": "z"}}
    assert _as_rank_1(script, monkeypatch, *arguments) == 2
    assert "exp_manager.name = None: Input should be a valid string" in capsys.readouterr().err


def test_the_yaml_file_can_be_another_one(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {path: p}\nsteps: 77\n")
    for flags in (["--config-path", str(tmp_path)], ["--config-dir", str(tmp_path)]):
        assert _as_rank_1(script, monkeypatch, *flags, "--config-name", "mine", "--cfg", "job") == 0
        assert yaml.safe_load(capsys.readouterr().out)["steps"] == 77


def test_a_config_group_can_be_chosen(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("path: small\n")
    (tmp_path / "model" / "large.yaml").write_text("path: large\nhidden_size: 1024\n")
    (tmp_path / "count.yaml").write_text("defaults:\n  - model: small\n  - _self_\n")
    assert _as_rank_1(script, monkeypatch, "-cp", str(tmp_path), "--cfg", "job", "model=large") == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"] == {"hidden_size": 1024, "path": "large"}


def test_a_user_s_file_wins_over_the_package_s_of_the_same_name(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for directory, steps, width in (("settings", 77, 7), ("other", 88, 8)):
        (tmp_path / directory / "model").mkdir(parents=True)
        (tmp_path / directory / "count.yaml").write_text(f"defaults: [model: small, _self_]\nsteps: {steps}\n")
        (tmp_path / directory / "model" / "small.yaml").write_text(f"path: p\nhidden_size: {width}\n")

    def settings(*arguments: str) -> tuple[int, int]:
        assert _as_rank_1(script, monkeypatch, *arguments, "--cfg", "job") == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        return printed["steps"], printed["model"]["hidden_size"]

    assert settings("--config-dir", "settings", "--config-name", "count") == (77, 7)
    assert settings("--config-path", str(tmp_path / "other")) == (88, 8)
    assert settings("--config-dir", "settings", "--config-path", str(tmp_path / "other")) == (77, 7)
    (tmp_path / "settings" / "count.yaml").unlink()  # a part alone wins as well
    assert settings("--config-dir", "settings", "--config-path", str(tmp_path / "other")) == (88, 7)


def test_a_copy_of_the_actor_s_settings_finds_the_methods_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    repository = Path(__file__).parents[2]
    actor = repository / "examples" / "nlp" / "gpt" / "train_gpt_ppo_actor.py"
    shutil.copy(repository / "conf" / "gpt_ppo_actor.yaml", tmp_path)
    needed = ["model.restore_from_path=m", "data.train=d"]
    for method in ([], ["method=ppo_kl"]):
        printed = []
        for where in ([], ["--config-path", str(tmp_path)], ["--config-dir", str(tmp_path)]):
            assert _as_rank_1(actor, monkeypatch, *needed, *method, *where, "--cfg", "job") == 0
            printed.append(yaml.safe_load(capsys.readouterr().out))
        assert printed[1:] == printed[:1] * 2
        assert printed[0]["shaping"]["energy_penalty"]["eta"] == (0.0 if method else 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps=1", "model.path=x", "steps=2"], "steps is given twice on the command line: steps=1 and steps=2"),
        (["steps=1", "++steps=1"], "steps is given twice on the command line: steps=1 and ++steps=1"),
        (["--config-dir", "/nowhere"], "/nowhere/count.yaml: Primary config directory not found"),
        ([], "required, but not set (??? in the YAML file): model.path"),
        (["model.path=x", "model.hidden_size=0"], "model.hidden_size = 0: Input should be greater than 0"),
        (["model.path=${nowhere}"], "model.path: Interpolation key 'nowhere' not found"),
        (["model.path"], "model.path: expected KEY=VALUE"),
        (["model.path=[1,"], "model.path=[1,: expected KEY=VALUE, see --help"),
        (["~nothing"], "'nothing' does not exist"),
        (["--config-name", "other"], "conf/other.yaml: no such file"),
        (["--config-path", "/nowhere"], "/nowhere/count.yaml: Primary config directory not found"),
        (["model.path=x", "exp_manager.create_wandb_logger=true"], "needs wandb_logger_kwargs with name and project"),
        (["model.path=x", "exp_manager.max_time_per_run=5m"], "max_time_per_run = '5m': expected DD:HH:MM:SS"),
        (["model.path=x", "steps=13"], "rank 1: steps = 13: an unlucky number"),
    ],
)
def test_what_cannot_work_is_said_in_one_message(
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert _as_rank_1(script, monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("waited 5 s\nrank 1: ")  # rank 0 tells first
    assert message in errors
    assert "Traceback" not in errors


FULL = "/runs/a: No space left on device; free some space there, or choose another directory"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("steps: wrong"), 2, "steps: wrong"),
        (ServerUnavailable("reward server at http://x:1 unavailable"), 1, "reward server at http://x:1 unavailable"),
        (ServiceError("the critic cannot go back"), 1, "the critic cannot go back"),
        (RewardFunctionError("reward function a:b gave nan"), 1, "reward function a:b gave nan"),
        (PeerError("rank 0 failed: KeyError: 'x'"), 1, "rank 0 failed: KeyError: 'x'"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, FULL),
        (PermissionError(errno.EACCES, "", "/x"), 1, "/x: Permission denied; give this user access to it, or"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None, ""),
        (RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer"), None, ""),
        (KeyError("a mistake"), None, ""),
    ],
)
@pytest.mark.parametrize("rank", [0, 3])
def test_the_first_cause_is_told_once_and_a_mistake_keeps_its_stack(
    rank: int,
    error: Exception,
    status: int | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("nemo_eppo.entry.job.time.sleep", waited.append)
    with pytest.raises(BaseException) as caught, errors_end_the_job(rank, Path("/runs/a")):
        raise error
    told = capsys.readouterr().err
    if status is None:
        assert caught.value is error
        assert told == ""
    else:
        assert isinstance(caught.value, SystemExit)
        assert caught.value.code == status
        assert told.startswith(f"rank 3: {message}" if rank else message)
        assert len(told.splitlines()) == 1
    follows = isinstance(error, PeerError) or "gloo" in str(error)  # from the failure of another rank
    assert waited == [10.0 if follows else 5.0 if rank else 0.0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: 1\nmodel: {path: p}\nsteps: 2\n", "mine.yaml:3: found duplicate key steps: 'steps: 2'"),
        ("model:\n\tpath: p\n", "mine.yaml:2: found character '\\t' that cannot start any token: '\\tpath: p'"),
        ("steps: 1\nmodel: {path: [\n", "mine.yaml:2: "),
        ("defaults: [model: broken]\n", "model/broken.yaml:2: found duplicate key path: 'path: q'"),
        (b"\xff", "mine.yaml: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_broken_yaml_file_is_named_with_line_and_key(
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str | bytes,
    fault: str,
) -> None:
    (tmp_path / "mine.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "broken.yaml").write_text("path: p\npath: q\n")
    assert _as_rank_1(script, monkeypatch, "--config-dir", str(tmp_path), "--config-name", "mine") == 2
    assert f"rank 1: {tmp_path}/{fault}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "directory"),
    [
        ({}, "nemo_experiments/default"),
        ({"exp_dir": "e", "name": "n"}, "e/n"),
        ({"exp_dir": "e", "name": "n", "version": "v"}, "e/n/v"),
        ({"exp_dir": "e", "name": "n", "explicit_log_dir": "x"}, "x"),
    ],
)
def test_the_run_directory_is_the_one_that_nemo_s_users_expect(settings: dict[str, Any], directory: str) -> None:
    assert load_config(ExpManagerConfig, settings).directory == Path.cwd() / directory


def test_a_job_without_exp_manager_is_a_mistake_of_its_author() -> None:
    class Incomplete(Config):
        steps: int = 1

    with pytest.raises(TypeError, match="Incomplete needs a field exp_manager"):
        job(Incomplete, config_name="count")


# NeMo is slow to import: the job runs twice as rank 0 and once as rank 1, and the tests look at what that left.


@pytest.fixture(scope="module")
def runs(script: Path) -> dict[str, dict[str, Any]]:
    left = {}
    (script.parent / "settings").mkdir()  # a user's file, and a part of it that stands in conf/
    (script.parent / "settings" / "count.yaml").write_text(f"defaults: [model: wide, _self_]\n{_YAML}mode: down\n")
    (script.parent / "conf" / "model").mkdir()
    (script.parent / "conf" / "model" / "wide.yaml").write_text("hidden_size: 1024\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.com"]
    for command in (["init", "-q"], ["add", "count.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=script.parent, check=True)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "ppo", "SLURM_NTASKS": "8"}  # Lightning would refuse these
    for name, rank, steps in (("first", "0", "5"), ("resumed", "0", "6"), ("other", "1", "6")):
        facts = script.parent / f"{name}.json"
        environment = {**slurm, "RANK": rank, "LOCAL_RANK": rank, "FACTS": str(facts), "WIDTH": "48"}
        arguments = ["model.path=x", f"steps={steps}", "exp_manager.may_change=[steps]"]
        status, output = _run(script, "--config-dir=settings", *arguments, **environment)
        assert status == 0, output
        (script.parent / "run" / "checkpoints" / "step_000005").mkdir(parents=True, exist_ok=True)
        left[name] = {**json.loads(facts.read_text()), "output": output}
    return left


def test_rank_0_runs_through_nemo_and_the_others_do_not(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["resumed"]["nemo"]
    assert not runs["other"]["nemo"]
    assert runs["resumed"]["config"] == runs["other"]["config"]
    assert runs["other"]["config"]["model"] == {"hidden_size": 48, "path": "x"}
    assert runs["other"]["config"]["mode"] == "down"
    assert runs["resumed"]["directory"] == runs["other"]["directory"]


def test_nemo_leaves_console_signals_and_working_directory_alone(runs: dict[str, dict[str, Any]], script: Path) -> None:
    for name in ("first", "resumed"):
        assert runs[name]["cwd"] == str(script.parent)
        assert runs[name]["captured_signals"] == []
        output = runs[name]["output"]
        assert "counting" in output
        for noise in ("NeMo", "GPU available", "OneLogger", "telemetry"):
            assert noise not in output


def test_a_restart_keeps_the_run_and_nemo_s_logs_of_both_starts(runs: dict[str, dict[str, Any]], script: Path) -> None:
    directory = script.parent / "run"
    assert str(directory) == runs["first"]["directory"]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["count"]) for row in rows] == [(5, 5.0), (6, 6.0)]
    config, start = read_config(directory / "config.yaml")
    assert config == runs["resumed"]["config"]
    assert start["model"] == "wide"  # the file that `defaults` chooses, as method=... does for the actor
    assert {*VERSIONS, "model", "time"} == start.keys()
    assert (directory / "log.txt").read_text().count("counting") == 2
    assert any((directory / "tensorboard").iterdir())
    for logs in (directory / "nemo", directory / "nemo" / "run_0"):
        assert (logs / "nemo_log_globalrank-0_localrank-0.txt").stat().st_size > 0
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=script.parent, text=True)
        assert f"commit hash: {commit}" in (logs / "git-info.log").read_text()
        command = (logs / "cmd-args.log").read_text()
        assert "model.path=x" in command
        assert command.startswith("count.py --config-dir=settings model.path=x steps=")  # as it was typed


def test_a_setting_that_makes_another_run_is_refused_and_any_other_change_is_told(
    runs: dict[str, dict[str, Any]], script: Path
) -> None:
    assert "changed since the last start" not in runs["first"]["output"]
    assert "changed since the last start: steps was 5, now 6" in runs["resumed"]["output"]
    status, output = _run(script, "--config-dir=settings", "model.path=y", "steps=6", "mode=up", WIDTH="48")
    assert status == 2
    assert output.splitlines() == [
        f"{script.parent / 'run'} holds a run that was started with other settings:",
        "  - mode was 'down', now 'up'",
        "  - model.path was 'x', now 'y'",
        "They would make another run out of it: set them back, choose another run directory (output of a launch, or "
        "exp_manager.explicit_log_dir, name or version), or accept them with "
        "'exp_manager.may_change=[mode,model.path]'",
        "heavy imports: []",
    ]


def test_settings_with_which_a_run_cannot_start_do_not_become_its_own(
    runs: dict[str, dict[str, Any]], script: Path
) -> None:
    file = script.parent / "run" / "config.yaml"
    before = file.read_bytes()
    arguments = ["model.path=x", "steps=13", "exp_manager.may_change=[steps]"]
    status, output = _run(script, "--config-dir=settings", *arguments, WIDTH="48")
    assert (status, "steps = 13: an unlucky number" in output) == (2, True), output
    assert file.read_bytes() == before


def test_a_mistake_in_the_code_keeps_its_stack_and_hydra_adds_nothing(script: Path) -> None:
    status, output = _run(script, "model.path=x", "steps=14", "exp_manager.explicit_log_dir=mistake")
    assert status == 1
    frames = [line.rpartition(", in ")[2] for line in output.splitlines() if ", in " in line]
    assert frames == ["<module>", "entry", "_run_through_nemo", "start", "main"]
    assert "KeyError: 'a mistake in the code'" in output
    assert "hydra" not in output.lower().replace("hydra_runner", "")
    assert "overrides" not in output


def test_a_run_is_not_overwritten_unless_it_is_resumed(runs: dict[str, dict[str, Any]], script: Path) -> None:
    status, output = _run(script, "model.path=x", "exp_manager.resume_if_exists=false")
    assert status == 2
    assert f"{script.parent / 'run'} holds a run already and exp_manager.resume_if_exists = false" in output


def test_two_jobs_do_not_share_a_run_directory(runs: dict[str, dict[str, Any]], script: Path) -> None:
    other = shutil.copy(script, script.with_name("other_job.py"))
    status, output = _run(Path(other), "model.path=x")
    assert status == 2
    assert f"{script.parent / 'run'} is the run directory of another job (settings of {script.name})" in output
    assert "heavy imports: []" in output


@pytest.mark.parametrize("name", KINDS)
def test_a_script_answers_help_and_a_wrong_key_without_torch(name: str) -> None:
    """Its import takes seconds, on every rank."""
    script = f"examples/nlp/gpt/{name}.py"
    for argument, told in (("--help", "usage:"), ("modle.precision=bf16", "modle: unknown key")):
        code = f"import runpy, sys; sys.argv = ['x', {argument!r}]\n"
        code += f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        code += "finally: print([name for name in ('torch', 'megatron', 'numpy') if name in sys.modules])"
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY
        )
        assert told in ended.stdout + ended.stderr
        assert ended.stdout.splitlines()[-1] == "[]"
