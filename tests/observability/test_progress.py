"""Progress without and with a terminal."""

import os
import pty
import subprocess
import sys
import time

import pytest

from nemo_eppo.observability.progress import PPO_COLUMNS, Progress
from nemo_eppo.observability.timers import Timers

_LOOP = """
from nemo_eppo.observability.progress import Progress
with Progress("PPO", total=3, columns={"reward": "reward/final"}) as progress:
    for step in (1, 2, 3):
        progress.update(step, {"reward/final": step / 2})
        print("hello from step", step)
"""


def test_a_log_file_gets_one_line_per_n_steps_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("PPO", total=25, columns=PPO_COLUMNS) as progress:
        for step in range(1, 26):
            progress.update(step, {"reward/final": 0.5, "rollout/tokens_per_second": 12345.6, "actor/loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["PPO 10/25", "PPO 20/25", "PPO 25/25"]
    assert "  reward 0.500  tokens/s 12,346  " in lines[0]
    assert lines[-1].endswith("  0:00 left")


def test_a_log_file_gets_a_line_while_a_step_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_eppo.observability.progress._QUIET_S", 0.2)
    timers = Timers()
    with Progress("PPO", total=3, columns={}, done=1, phase=timers.running) as progress:
        with timers("generate"):
            time.sleep(0.7)
        time.sleep(0.3)
        progress.update(3, {})
        time.sleep(0.3)
    with Progress("PPO", total=3, columns={}, disable=True):
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "PPO step 2/3: 0 s so far, generate for 0 s"
    assert lines[1].startswith("PPO step 2/3: ")
    assert "PPO step 2/3: 1 s so far" in lines
    assert lines[-2].startswith("PPO 3/3")
    assert lines[-1] == "PPO is saving: 0 s so far"


def test_time_left_counts_the_steps_of_this_run_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50.0]
    monkeypatch.setattr("nemo_eppo.observability.progress.time.perf_counter", lambda: now[0])
    with Progress("PPO", total=1000, columns={}, done=90) as progress:  # resumed at step 90
        now[0] += 50.0
        progress.update(100, {})
    assert "5.00 s/step  1:15:00 left" in capsys.readouterr().out


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("PPO", total=1, columns={}, disable=True) as progress:
        progress.update(1, {})
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_that_other_output_does_not_break() -> None:
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", _LOOP], stdout=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(reader, 65536)
        except OSError:  # the other end is closed
            break
    os.close(reader)
    assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert "3/3" in text
    assert "reward 1.500" in text
    assert "hello from step 2\r\n" in text
