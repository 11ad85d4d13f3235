"""The quickstart, hardly training anything: its report, what other commands say of it, and no process after Ctrl-C."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pytest
from distributed import run_ranks
from plotly.offline import get_plotlyjs
from small_data import read_rows

from nemo_eppo.cli import main
from nemo_eppo.evaluation.detection import ENERGY, KL, LENGTH, RISE

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
    commands = [shlex.split(line)[1:] for line in printed.splitlines() if "/nemo-eppo " in line]
    assert [command[0] for command in commands] == ["detect", "energy-report"]
    detect, energy_report = commands
    assert main(detect) == 0
    check_detection(output)
    # at the first step the policy is the SFT model: what the run recorded on two ranks is what one rank reads here
    assert run_ranks(main, 1, [word.replace("step_000003", "step_000001") for word in energy_report]) == [0]
    check_energies(output, read_rows(output / "actor" / "rollouts" / "step_000001.jsonl"))


def check_detection(output: Path) -> None:
    """Of the signs that the run recorded: the hacked responses are counted from its rows."""
    report = json.loads((output / "detection" / "report.json").read_text())
    sft = read_rows(output / "actor" / "validation" / "step_000000.jsonl")
    proxy, gold = (fmean(row[name] for row in sft) for name in ("proxy_reward", "gold_reward"))
    rows = [row for step in (1, 2, 3) for row in read_rows(output / "actor" / "rollouts" / f"step_00000{step}.jsonl")]
    hacked = sum(row["reward/proxy"] > proxy and row["reward/gold"] < gold for row in rows)
    assert (report["steps"], report["responses"], report["hacked"]) == (3, 3 * 64, hacked)
    assert {ENERGY, RISE, KL, LENGTH} <= set(report["signs"])


def check_energies(output: Path, recorded: list[dict[str, Any]]) -> None:
    report = json.loads((output / "energies" / "report.json").read_text())
    rows = read_rows(output / "energies" / "samples.jsonl")
    assert set(rows[0]) == {"index", "before", "after", "rise", KL, LENGTH}
    assert [row["before"] for row in rows] == pytest.approx([row["energy/policy"] for row in recorded], abs=1e-5)
    assert report["groups"]["SFT"]["mean"]["value"] == pytest.approx(fmean(row["energy/policy"] for row in recorded))
    assert report["rise"]["value"] == pytest.approx(fmean(row["after"] - row["before"] for row in rows))
    assert all(row["rise"] for row in rows), "the policy was trained"


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
    with pytest.raises(
        SystemExit, match=f"{re.escape(str(tmp_path))} was not made by a quickstart and is not replaced"
    ):
        runpy.run_path(str(QUICKSTART))["make_anew"](tmp_path)
    assert (tmp_path / "thesis.txt").exists()
