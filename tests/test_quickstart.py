"""The quickstart, hardly training anything: it runs to its report, and Ctrl-C leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from plotly.offline import get_plotlyjs

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


def start(output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(QUICKSTART), "--fast", "--steps", "3", "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_of(output: Path) -> list[str]:
    """Command lines of running processes that know the output directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(output) in line and process.pid != os.getpid():
            found.append(line)
    return found


def test_it_ends_with_a_report_and_a_summary(tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    process = start(output)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed[-4000:]
    summary = json.loads((output / "summary.json").read_text())
    for moment in ("before", "after"):
        assert set(summary[moment]) == {"proxy_reward", "gold_reward", "energy_loss", "response_length"}
        assert all(isinstance(value, float) for value in summary[moment].values())
    assert summary["before"] != summary["after"]
    assert (summary["steps"], summary["tensor_model_parallel_size"]) == (3, 2)
    assert summary["seconds"] > 0
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (output / "report.html").read_text()
    for words in ("Proxy reward", "Gold reward", "Energy loss", "KL", "=&gt;"):  # the last: a prompt's separator
        assert words in report
    assert "http://" not in report.replace(get_plotlyjs(), "").replace("http://127.0.0.1", "")
    for words in ("Gold reward", str(output / "report.html")):
        assert words in printed
    assert processes_of(output) == []


@pytest.mark.slow
def test_ctrl_c_stops_every_process_it_started(tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    process = start(output)
    assert process.stdout is not None
    for line in process.stdout:
        if "actor: running" in line:
            break
    time.sleep(3)  # the actor's ranks are coming up, the servers are there
    assert any("serve_reward_model" in line for line in processes_of(output))
    process.send_signal(signal.SIGINT)
    assert process.wait(90) != 0
    assert processes_of(output) == []


def test_a_directory_that_it_did_not_make_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    process = start(tmp_path)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert str(tmp_path) in printed
    assert (tmp_path / "thesis.txt").exists()
