"""Forked jobs behave as those that Python starts anew."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from jobs import end_of

from nemo_eppo.launch.nursery import Nursery

SCRIPT = """
import atexit, gc, glob, json, os, sys, threading, time
told = json.dumps({
    "argv": sys.argv[1:], "beside": "companion" in dir(__import__("beside")), "file": __file__, "name": __name__,
    "rank": os.environ.get("RANK"), "world": os.environ.get("WORLD_SIZE"), "mine": os.environ.get("MINE"),
    "torch": "torch" in sys.modules, "threads": threading.active_count(), "frozen": gc.get_freeze_count() > 100_000,
})
os.write(1, f"{told}\\n".encode())  # at once: the ranks share a log
atexit.register(lambda: print("the end", flush=True))
if sys.argv[1] == "wait":
    time.sleep(60)
world = int(os.environ.get("WORLD_SIZE", "1"))
open(f"{__file__}.rank{os.environ.get('RANK', '0')}", "w").close()
while len(glob.glob(f"{__file__}.rank*")) < world:  # the first rank that fails ends the others
    time.sleep(0.05)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return Nursery({"MINE": "for all", "OMP_NUM_THREADS": "1"})


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("companion = 1\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_a_script_has_its_arguments_environment_imports_and_exit_status(nursery: Nursery, script: Path) -> None:
    log = script.with_suffix(".log")
    assert end_of(nursery.start([str(script), "7", "key=[a, b]"], 1, log), 60) == 7
    told, end = log.read_text().splitlines()
    assert json.loads(told) == {
        "argv": ["7", "key=[a, b]"], "beside": True, "file": str(script), "name": "__main__", "rank": None,
        "world": None, "mine": "for all", "torch": True, "threads": 1, "frozen": True,
    }  # fmt: skip
    assert end == "the end", "what is registered with atexit is called"


def test_a_mistake_of_a_rank_is_told_with_its_stack_before_torchruns_report(nursery: Nursery, script: Path) -> None:
    log = script.with_suffix(".log")
    assert end_of(nursery.start([str(script), "seven"], 2, log), 60) == 1
    told, _, _ = log.read_text().partition("failed (exitcode: ")
    assert 'script.py", line' in told
    assert "ValueError: invalid literal for int() with base 10: 'seven'" in told


def test_ranks_find_each_other_and_75_is_the_exit_status_of_all(nursery: Nursery, script: Path) -> None:
    log = script.with_suffix(".log")
    assert end_of(nursery.start([str(script), "75"], 2, log), 60) == 75
    told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert {(row["rank"], row["world"]) for row in told} == {("0", "2"), ("1", "2")}


def test_a_job_is_seen_under_its_own_name_and_ended_with_all_its_ranks(nursery: Nursery, script: Path) -> None:
    job = nursery.start([str(script), "wait", "x" * 3000, "last"], 2, script.with_suffix(".log"))

    def seen() -> list[psutil.Process]:
        lines = [(p, " ".join(p.info["cmdline"] or ())) for p in psutil.process_iter(["cmdline"])]
        return [p for p, line in lines if str(script) in line and line.rstrip().endswith("last")]

    deadline = time.monotonic() + 60
    while len(seen()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.terminate()
    assert end_of(job, 60) in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert seen() == []
