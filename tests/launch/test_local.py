"""A launch on this machine stops everything it has started, whatever ends it."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import Models, nursery
from launched import eppo, processes_of, shared_memory_of, write

from nemo_eppo.cli import main
from nemo_eppo.config import NOT_FINISHED, ConfigError
from nemo_eppo.launch.examination import check_launch
from nemo_eppo.launch.gpus import Gpus
from nemo_eppo.launch.launch_file import read_launch
from nemo_eppo.launch.local import LaunchError, Supervisor, run_local
from nemo_eppo.launch.status import Row, State, Status
from nemo_eppo.observability.metrics import read_metrics


def start(file: Path, stdout: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nemo_eppo.cli", "launch", str(file)]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def terminal() -> Iterator[tuple[int, bytearray]]:
    """Something to print on that is a terminal, and all that was printed there until its last user has left."""
    outer, inner = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):  # the other end was closed
            while data := os.read(outer, 4096):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield inner, shown
    finally:
        os.close(inner)
        reader.join()
        os.close(outer)


def test_a_killed_server_is_started_again_and_a_killed_actor_stops_all_jobs(models: Models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    metrics = output / "actor" / "metrics.jsonl"
    file = write(eppo(models, output, steps=10_000), tmp_path / "launch.yaml")
    with terminal() as (stdout, shown), start(file, stdout) as process:
        try:
            wait_for(lambda: b"step 2" in shown, process)
            with pytest.raises(ConfigError, match=rf"{output} is in use by .*, process {process.pid}, started "):
                run_local(read_launch(file))
            blocks = shared_memory_of(process.pid)
            assert blocks
            ready = output / "logs" / "reward.ready.json"
            killed = json.loads(ready.read_text())
            os.kill(killed["pid"], signal.SIGKILL)
            again = output / "logs" / "reward.log"
            wait_for(lambda: again.read_text().count("reward server listens on") == 2, process)
            assert again.read_text().count(killed["url"]) == 2  # where the actor knows it
            steps = len(metrics.read_text().splitlines())
            wait_for(lambda: len(metrics.read_text().splitlines()) > steps + 2, process)
            every = psutil.Process(process.pid).children(recursive=True)
            children = [p for p in every if p.status() != psutil.STATUS_ZOMBIE]
            next(p for p in children if "train_gpt_ppo_actor" in " ".join(p.cmdline())).kill()
            _, error = process.communicate(timeout=90)
        except BaseException:
            process.terminate()
            raise
    assert process.returncode == 128 + signal.SIGKILL, error
    assert error.endswith(f"launch: actor ended with exit status -9; its log is {output}/logs/actor.log\n")
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert rows == [*range(1, len(rows) + 1)]
    assert processes_of(output) == []
    assert [block for block in blocks if block.exists()] == []
    for word in ("address", "grpc://127.0.0.1:", "starting", "ready", "running", "failed", "stopped"):
        assert word in shown.decode()


def test_a_server_that_is_started_again_is_named_and_counts_its_time_anew(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nemo_eppo.launch.local._argv", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    launch = read_launch(write(eppo(models, tmp_path / "out"), tmp_path / "launch.yaml"))
    supervisor = Supervisor(launch, Gpus(launch, []))
    row = next(row for row in supervisor.rows if row.name == "reward")
    supervisor._start("reward")
    row.url = "grpc://127.0.0.1:1"  # it had been ready
    while not supervisor._restarts["reward"]:
        supervisor._watch("reward", Status(supervisor.rows))
        time.sleep(0.01)
    assert (row.state, row.ended) == (State.STARTING, 0.0)
    log = tmp_path / "out" / "logs" / "reward.log"
    assert f"reward: ended with exit status 3, is started again (1 of 3); its log is {log}\n" in capsys.readouterr().out


def test_metrics_of_an_earlier_start_are_not_shown(tmp_path: Path) -> None:
    row = Row("actor", 1, tmp_path, started=time.monotonic())
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 78, "time": 0.0, "loss": 1.5}\n')
    os.utime(metrics, (time.time() - 60, time.time() - 60))
    assert row.metrics() == ""
    os.utime(metrics, (time.time() + 1, time.time() + 1))
    assert row.metrics() == "step 78  loss 1.5"
    assert Row("waits", 1, tmp_path).metrics() == ""


def test_jobs_that_are_told_to_end_show_how_long_they_may_take(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nemo_eppo.launch.local.GRACE_S", 1.5)
    monkeypatch.setattr("nemo_eppo.launch.status.LINE_INTERVAL_S", 0.4)
    launch = read_launch(write(eppo(models, tmp_path / "out"), tmp_path / "launch.yaml"))
    launch.output.mkdir()
    supervisor = Supervisor(launch, Gpus(launch, []))
    for name, at_signal in (("actor", "lambda *_: (time.sleep(0.6), sys.exit())"), ("reward", "signal.SIG_IGN")):
        code = f"import signal, sys, time; signal.signal(15, {at_signal}); print(flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it is ready for the signal
        supervisor._processes[name] = process
    with Status(supervisor.rows) as status:
        supervisor.stop(status)
    assert not psutil.pid_exists(process.pid)
    told = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    limit = "what takes longer than 2 s is killed. Ctrl-C has no effect meanwhile."
    servers = told.index(f"servers end (reward); {limit}")
    assert told[0] == f"trainings save after the step at hand, then end (actor); {limit}"
    assert {line[:23] for line in told[1 : servers - 1]} == {"actor: saving, at most "}
    assert told[servers - 1] == "actor: stopped"
    assert len(told[servers + 1 : -1]) >= 2
    assert {line[:26] for line in told[servers + 1 : -1]} == {"reward: stopping, at most "}
    assert told[-1] == "reward: killed"


def sft_of_two_ranks(models: Models, **settings: Any) -> dict[str, Any]:
    data = {side: str(models.data / f"sft.{side}.jsonl") for side in ("train", "validation")}
    settings |= {"model.restore_from_path": str(models.sft), "data": data}
    return {"script": "train_gpt_sft", "ranks_per_node": 2, "settings": settings}


def test_no_job_starts_from_one_whose_time_was_up(models: Models, tmp_path: Path) -> None:
    early = sft_of_two_ranks(
        models, fit={"global_batch_size": 8, "max_steps": 3}, exp_manager={"max_time_per_run": "00:00:00:00"}
    )
    later = sft_of_two_ranks(models, fit={"global_batch_size": 8}) | {"needs": ["sft"]}
    launch = {"name": "tiny", "output": str(tmp_path / "out"), "jobs": {"sft": early, "later": later}}
    with pytest.raises(LaunchError) as stopped:
        run_local(read_launch(write(launch, tmp_path / "launch.yaml")), nursery())
    assert stopped.value.status == NOT_FINISHED
    assert "launch: sft ended before its last step; the same command resumes it; its log is " in str(stopped.value)
    assert "SFT ended after step 1 of 3; its checkpoint is " in str(stopped.value)
    assert not (tmp_path / "out" / "logs" / "later.log").exists()


def test_of_a_job_of_several_ranks_the_fault_is_shown_and_not_torchruns_report(models: Models, tmp_path: Path) -> None:
    job = sft_of_two_ranks(models, fit={"global_batch_size": 1000})
    launch = {"name": "tiny", "output": str(tmp_path / "out"), "jobs": {"sft": job}}
    with pytest.raises(LaunchError) as failed:
        run_local(read_launch(write(launch, tmp_path / "launch.yaml")), nursery())
    assert "the data set has 16 examples, fewer than one global batch of 1000: " in str(failed.value)
    assert "failed (exitcode: 2) local_rank: " in str(failed.value)
    assert "ChildFailedError" in (tmp_path / "out" / "logs" / "sft.log").read_text()
    assert "ChildFailedError" not in str(failed.value)


def test_an_actor_that_needs_no_server_is_launched_alone_and_swept(models: Models, tmp_path: Path) -> None:
    launch = eppo(models, tmp_path / "out")
    launch["jobs"] = {"actor": launch["jobs"]["actor"] | {"needs": []}}
    settings = launch["jobs"]["actor"]["settings"]
    file = tmp_path / "launch.yaml"
    with pytest.raises(ConfigError, match=r"jobs\.actor\.needs: expected one serve_ppo_critic, found none\n"):
        check_launch(read_launch(write(launch, file)), here=True)
    settings |= {"method": "grpo", "ppo.samples_per_prompt": 2}
    with pytest.raises(ConfigError, match=r"^jobs\.actor\.needs: expected a serve_reward_model"):
        check_launch(read_launch(write(launch, file)), here=True)
    settings["rewards"] = [{"function": "nemo_eppo.tools.noun_task:gold_reward"}]
    launch["jobs"]["actor"]["ranks_per_node"] = 1
    settings["model.parallel.tensor_model_parallel_size"] = 1
    sweep = ["launch", str(write(launch, file)), "--sweep", "shaping.missing_eos.penalty=0,1"]
    assert main(sweep) == 0
    runs = [tmp_path / "out" / f"shaping.missing_eos.penalty={value}" / "actor" for value in (0, 1)]
    logs = [tmp_path / "out" / "logs" / run.parent.name / "actor.log" for run in runs]
    first, second = (log.read_text() for log in logs)
    shutil.rmtree(runs[1] / "checkpoints")  # as if it had been interrupted
    assert main(sweep) == 0
    assert logs[0].read_text() == first, "it was not started again"
    assert logs[1].read_text().startswith(second)
    assert logs[1].read_text() != second
    metrics = read_metrics(runs[1] / "metrics.jsonl")
    assert metrics["reward/final"][0] == [1, 2]
    assert "critic/loss" not in metrics
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]
    assert [run["settings"] for run in compared.values()] == [{"shaping.missing_eos.penalty": eta} for eta in (0, 1)]
    assert [run["steps"] for run in compared.values()] == [2, 2]


def test_ctrl_c_before_anything_has_started_leaves_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    os.mkfifo(file)

    def press_ctrl_c() -> None:
        with file.open("w"):  # waits until the launcher reads it
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    try:
        threading.Thread(target=press_ctrl_c, daemon=True).start()
        assert main(["launch", str(file)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow  # that a job ends with its launcher is shown in tests/entry, and of its ranks in test_nursery.py
def test_jobs_end_when_the_launcher_itself_is_killed(models: Models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(write(eppo(models, output), tmp_path / "launch.yaml"), subprocess.DEVNULL)
    wait_for(lambda: len(processes_of(output, but=process.pid)) >= 3, process)  # all jobs
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while processes_of(output):
        assert time.monotonic() < deadline
        time.sleep(0.1)
