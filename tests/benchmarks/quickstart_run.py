"""The quickstart from end to end: seconds of its stages, peak memory of all its processes, what the policy learnt.

Each round is a run of examples/quickstart.py with a seed of its own; quartiles are over the rounds. A stage lasts from
the end of the one before to the line or the metrics that end it, so `SFT` has the imports of all jobs, and `steps` the
last validation. Memory is the proportional set size (PSS) of the process and all its descendants, looked at twice a
second. Rewards and energy losses are means over the validation prompts, before and after training.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
from pairs import Options, Row, Spread

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"
INTERVAL_S = 0.5
"""Seconds between two looks at memory."""
ENDS = {  # what is printed when a stage ends
    "data": "2/3 launching",
    "SFT": "sft: done",
    "reward model": "reward_model: done",
    "steps": "actor: done",
    "servers' end": "3/3 writing",
    "report": "Summary:",
}
STAGES = ("data", "SFT", "reward model", "launch to the first step", "steps", "servers' end", "report")


def measure(options: Options) -> list[Row]:
    found: dict[str, list[float]] = {}
    for seed in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for what, value in run(Path(folder) / "run", seed, options.smallest).items():
                found.setdefault(what, []).append(value)
    rows: list[Row] = []
    for what, values in found.items():
        low, middle, high = Spread.of(values)
        rows.append({"what": what, "median": middle, "q1": low, "q3": high})
    return rows


def run(output: Path, seed: int, smallest: bool) -> dict[str, float]:
    """Run it once; return seconds, MiB, rewards and energy losses."""
    command = [sys.executable, str(QUICKSTART), "--output", str(output), "--seed", str(seed)]
    command += ["--fast", "--steps", "3"] if smallest else []
    ended = {"start": time.time()}
    use: list[float] = []
    printed: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        over = threading.Event()
        watch = threading.Thread(target=look, args=(psutil.Process(process.pid), over, use))
        watch.start()
        for line in process.stdout:
            printed.append(line)
            ended |= {stage: time.time() for stage, words in ENDS.items() if words in line}
        over.set()
        watch.join()
    if process.returncode:
        raise SystemExit(f"the quickstart ended with {process.returncode}: {''.join(printed)}")
    steps = map(json.loads, (output / "actor" / "metrics.jsonl").read_text().splitlines())
    ended["launch to the first step"] = next(row["time"] for row in steps if row["step"] == 1)
    moments = [ended["start"], *(ended[stage] for stage in STAGES)]
    seconds = {f"{stage}, s": end - begin for stage, (begin, end) in zip(STAGES, pairwise(moments), strict=True)}
    summary = json.loads((output / "summary.json").read_text())
    learnt = {
        f"{name.replace('_', ' ')} {moment}": summary[moment][name]
        for name in ("gold_reward", "energy_loss")
        for moment in ("before", "after")
    }
    return {**seconds, "total, s": moments[-1] - moments[0], "peak PSS, MiB": max(use), **learnt}


def look(process: psutil.Process, over: threading.Event, use: list[float]) -> None:
    """Add the memory of a process and its descendants to `use`, MiB, until it is `over`."""
    while not over.wait(INTERVAL_S):
        use.append(0.0)
        processes = [process]
        with suppress(psutil.Error):  # here and below: it has ended meanwhile
            processes += process.children(recursive=True)
        for one in processes:
            with suppress(psutil.Error):
                use[-1] += one.memory_full_info().pss / 2**20
