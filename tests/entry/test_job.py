"""The entry of job scripts: command line, errors, run directory; NeMo itself on rank 0."""

import errno
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from count_job import run_job

from nemo_eppo.config import Config, ConfigError, load_config
from nemo_eppo.entry.job import errors_end_the_job, job
from nemo_eppo.megatron.collectives import PeerError
from nemo_eppo.rewards.functions import RewardFunctionError
from nemo_eppo.servers.client import ServerUnavailable
from nemo_eppo.servers.protocol import ServiceError
from nemo_eppo.settings.kinds import KINDS
from nemo_eppo.settings.run import ExpManagerConfig

REPOSITORY = Path(__file__).parents[2]


def test_an_unknown_key_is_one_message_and_costs_no_heavy_import(script: Path) -> None:
    status, output = run_job(script, "model.path=x", "model.hiden_size=3", "stepz=1")
    assert status == 2
    assert output.splitlines() == [
        "invalid configuration:",
        "  - model.hiden_size: unknown key (did you mean 'hidden_size'?)",
        "  - stepz: unknown key (did you mean 'steps'?)",
        "heavy imports: []",
    ]


def test_help_teaches_every_setting(script: Path) -> None:
    status, output = run_job(script, "--help", "steps=7")
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
        ([], "model.path: required, but not set"),
        (["model.path=x", "model.hidden_size=0"], "model.hidden_size = 0: Input should be greater than 0"),
        (["model.path=${nowhere}"], "model.path: Interpolation key 'nowhere' not found"),
        (["model.path"], "model.path: expected KEY=VALUE"),
        (["model.path=[1,"], "model.path=[1,: expected KEY=VALUE; quote a value"),
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


ALL_SCRIPTS = """
import contextlib, io, json, runpy, sys

for name in sys.argv[1:]:
    for argument in ("--help", "modle.precision=bf16"):
        sys.argv = ["x", argument]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            runpy.run_path(f"examples/nlp/gpt/{name}.py", run_name="__main__")
        heavy = [module for module in ("torch", "megatron", "numpy") if module in sys.modules]
        print(json.dumps([name, argument, said.getvalue(), heavy]))
"""


def test_scripts_answer_help_and_a_wrong_key_without_torch() -> None:
    """Its import takes seconds, on every rank."""
    command = [sys.executable, "-c", ALL_SCRIPTS, *KINDS]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    expected = {"--help": "usage:", "modle.precision=bf16": "modle: unknown key"}
    assert [(name, argument) for name, argument, *_ in answers] == [(name, each) for name in KINDS for each in expected]
    for name, argument, said, heavy in answers:
        assert expected[argument] in said, name
        assert heavy == [], (name, argument)
