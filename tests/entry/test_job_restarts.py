"""The run directory of a job over its starts.

NeMo is slow to import: the job runs twice as rank 0 and once as rank 1, and the tests look at what that left. What
they still run as rank 0 is forked.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from count_job import YAML, fork_job, run_job

from nemo_eppo.observability.report_tables import VERSIONS, read_config


@pytest.fixture(scope="module")
def runs(script: Path) -> dict[str, dict[str, Any]]:
    left = {}
    (script.parent / "settings").mkdir()  # a user's file, and a part of it that stands in conf/
    (script.parent / "settings" / "count.yaml").write_text(f"defaults: [model: wide, _self_]\n{YAML}mode: down\n")
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
        status, output = run_job(script, "--config-dir=settings", *arguments, **environment)
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
    status, output = run_job(script, "--config-dir=settings", "model.path=y", "steps=6", "mode=up", WIDTH="48")
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
    status, output = fork_job(script, "--config-dir=settings", *arguments, WIDTH="48")
    assert (status, "steps = 13: an unlucky number" in output) == (2, True), output
    assert file.read_bytes() == before


def test_a_mistake_in_the_code_keeps_its_stack_and_hydra_adds_nothing(script: Path) -> None:
    status, output = fork_job(script, "model.path=x", "steps=14", "exp_manager.explicit_log_dir=mistake")
    assert status == 1
    frames = [line.rpartition(", in ")[2] for line in output.splitlines() if ", in " in line]
    assert frames[-5:] == ["<module>", "entry", "_run_through_nemo", "start", "main"]
    assert "KeyError: 'a mistake in the code'" in output
    assert "hydra" not in output.lower().replace("hydra_runner", "")
    assert "overrides" not in output


def test_a_run_is_not_overwritten_unless_it_is_resumed(runs: dict[str, dict[str, Any]], script: Path) -> None:
    status, output = run_job(script, "model.path=x", "exp_manager.resume_if_exists=false")
    assert status == 2
    assert f"{script.parent / 'run'} holds a run already and exp_manager.resume_if_exists = false" in output


def test_two_jobs_do_not_share_a_run_directory(runs: dict[str, dict[str, Any]], script: Path) -> None:
    other = shutil.copy(script, script.with_name("other_job.py"))
    status, output = run_job(Path(other), "model.path=x")
    assert status == 2
    assert f"{script.parent / 'run'} is the run directory of another job (settings of {script.name})" in output
    assert "heavy imports: []" in output
