"""A launch on this machine stops everything it has started, whatever ends it."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from jobs import Models
from runs import eppo, processes_of, shared_memory, write

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.local import run_local
from nemo_eppo.launch.schema import read_launch


def start(file: Path, stdout: int | IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nemo_eppo.cli", "launch", str(file)]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_server_stops_all_jobs_and_the_end_of_its_log_is_shown(models: Models, tmp_path: Path) -> None:
    output, before = tmp_path / "out", shared_memory()
    file = write(eppo(models, output, steps=10_000), tmp_path / "launch.yaml")
    with (tmp_path / "printed.txt").open("w+") as printed:
        process = start(file, printed)
        metrics = output / "actor" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
        with pytest.raises(ConfigError, match="a launch with this output is running"):
            run_local(read_launch(file))
        os.kill(json.loads((output / "logs" / "reward.ready.json").read_text())["pid"], signal.SIGKILL)
        _, error = process.communicate(timeout=90)
        printed.seek(0)
        lines = printed.read()
    assert process.returncode == 128 + signal.SIGKILL, error
    assert "reward server listens on http://127.0.0.1:" in error  # in its log
    assert error.endswith(f"launch: reward ended with exit status -9; its log is {output}/logs/reward.log\n")
    assert processes_of(output) == []
    assert shared_memory() <= before
    for words in (
        "critic: ready http://127.0.0.1:",
        "actor: running",
        "actor: step ",
        "reward: failed",
        "critic: stopped",
    ):
        assert words in lines


def test_on_a_terminal_it_shows_a_table_and_its_own_sudden_death_ends_its_jobs(models: Models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    launch = eppo(models, output)
    launch["jobs"] = {"reward": launch["jobs"]["reward"]}
    terminal, inner = pty.openpty()
    process = start(write(launch, tmp_path / "launch.yaml"), inner)
    os.close(inner)
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(terminal, 4096):
                shown.extend(data)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: b"http://127.0.0.1:" in shown, process)
    process.kill()
    process.communicate()
    reader.join()
    os.close(terminal)
    assert all(word in shown.decode() for word in ("address", "reward", "ready"))
    for _ in range(150):
        if not processes_of(output):
            break
        time.sleep(0.2)
    assert processes_of(output) == []
