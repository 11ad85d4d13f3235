"""Shows whether the GPU path works, part by part: bash tests/gpu/run.sh [--only PART ...]. README.md says more."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from checks import CHECK, FAIL, PASS
from pairs import Options, Row, write

from nemo_eppo.megatron import device

PARTS = ("parity", "decoder", "job", "training", "device_memory", "checkpoint", "device_idle")
"""In the order of what they teach, should time end."""
LIMIT_S = 480
"""Seconds that a part may take."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant is measured (%(default)s)")
    parser.add_argument("--smallest", action="store_true", help="tiny sizes, for a CPU: shows that everything runs")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of results (%(default)s)")
    arguments = parser.parse_args()
    options = Options(arguments.rounds, arguments.smallest, None)
    if not device.on_gpu() and not options.smallest:
        parser.error("torch sees no GPU (torch.cuda.is_available() is false); a CPU takes only --smallest")
    print(f"torch {torch.__version__}, {', '.join(device.describe()) or 'no GPU'}", flush=True)
    if len(arguments.only) > 1 and not options.smallest:  # in a process of its own each, which may lose its GPU
        command = [sys.executable, *sys.argv, "--only"]
        passed = [in_time([*command, name], arguments.output) for name in arguments.only]
    else:
        passed = [run(name, options, arguments.output) for name in arguments.only]
    ok = all(passed)
    print("everything passed" if ok else "something FAILED", flush=True)
    sys.exit(0 if ok else 1)


def in_time(command: list[str], output: Path) -> bool:
    """Run a part in a process of its own, and tell whether it passed; its rows so far are kept if it does not end."""
    part = subprocess.Popen(command, start_new_session=True)
    try:
        status = part.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        found = f"not ended after {LIMIT_S} s"
        # first so that what it has launched ends its jobs, which would disturb the next part
        for told, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(part.pid, told)
                part.wait(patience)
    else:
        if status in (0, 1):  # 1: its rows say what failed
            return status == 0
        found = f"exit status {status}"
    name = command[-1]
    file = output / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows.append({"what": "the part ends", "expected": "no error", "found": found, CHECK: FAIL})
    write(output, name, f"{name}, which did not end", rows, 0)
    print(json.dumps({"part": name, **rows[-1]}), flush=True)
    return False


def run(name: str, options: Options, output: Path) -> bool:
    """Run a part, print each row as JSON when it is known, and write those so far; tell whether all checks passed."""
    rows: list[Row] = []
    about = f"{name} did not begin"
    for row in guarded(name, options):
        rows.append(row)
        print(json.dumps({"part": name, **row}), flush=True)
        about = str(importlib.import_module(name).__doc__).strip() if name in sys.modules else about
        table = write(output, name, about, rows, options.rounds)
    print(f"\n{name}: {about}\n{table}", flush=True)
    return all(row.get(CHECK) != FAIL for row in rows)


def guarded(name: str, options: Options) -> Iterator[Row]:
    """The rows of a part, and that it came to its end or did not."""
    torch.manual_seed(0)
    row: Row = {"what": "the part ends", "expected": "no error"}
    try:
        yield from importlib.import_module(name).measure(options)
    except Exception as error:
        traceback.print_exc()
        yield {**row, "found": f"{type(error).__name__}: {str(error)[:500]}".replace("\n", " "), CHECK: FAIL}
    else:
        yield {**row, "found": "no error", CHECK: PASS}


if __name__ == "__main__":
    main()
