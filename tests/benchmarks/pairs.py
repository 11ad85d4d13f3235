"""What all benchmarks share: contestants measured in turn, ratios with their spread, results as JSON and as a table.

Times of a shared machine drift by tens of percent within minutes. So contestants take turns, and a ratio compares two
times of one round. CPU time, that of all threads of the process, tells more than the clock on a crowded machine.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from nemo_eppo.megatron import device

Row = dict[str, str | float]
Contestant = Callable[[], object]
"""Does the work that is measured; an int that it returns is how many units of work it was, else it was one."""
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "nvidia-pytriton", "transformers", "trl")


class Options(NamedTuple):
    """What the command line asks of a benchmark."""

    rounds: int
    smallest: bool
    """Sizes that show only that everything runs."""
    against: Path | None
    """Another checkout, for those that compare two."""


class Seconds(NamedTuple):
    """How long a unit of work took."""

    clock: float
    cpu: float

    @classmethod
    def of(cls, work: Contestant) -> "Seconds":
        device.synchronize()
        clock, cpu = time.perf_counter(), time.process_time()
        done = work()
        device.synchronize()
        units = done if isinstance(done, int) else 1
        return cls((time.perf_counter() - clock) / units, (time.process_time() - cpu) / units)


class Spread(NamedTuple):
    """Quartiles of some numbers."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


def interleave(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[Seconds]]:
    """Return the times of each contestant in each round.

    Each is called once before, which does not count. Who begins a round changes from round to round.
    """
    names = list(contestants)
    for name in names:
        contestants[name]()
    seconds: dict[str, list[Seconds]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(Seconds.of(contestants[name]))
    return seconds


def medians(seconds: Mapping[str, Sequence[Seconds]], **labels: str | float) -> list[Row]:
    """Return a row for each contestant, with its median times."""
    rows: list[Row] = []
    for name, times in seconds.items():
        row: Row = {**labels, "what": name}
        for part in Seconds._fields:
            row[f"{part} s"] = statistics.median(getattr(one, part) for one in times)
        rows.append(row)
    return rows


def compare(seconds: Mapping[str, Sequence[Seconds]], base: str, **labels: str | float) -> list[Row]:
    """Add to the rows of `medians` the median and the quartiles of each contestant's ratio to `base`."""
    rows = medians(seconds, **labels)
    for row, times in zip(rows, seconds.values(), strict=True):
        row["ratio to"] = base
        pairs = list(zip(times, seconds[base], strict=True))
        for part in Seconds._fields:
            ratio = Spread.of([getattr(mine, part) / getattr(other, part) for mine, other in pairs])
            row |= {f"{part} ratio": ratio.median, f"{part} q1": ratio.low, f"{part} q3": ratio.high}
    return rows


def write(folder: Path, name: str, about: str, rows: Sequence[Row], rounds: int) -> str:
    """Write rows to NAME.json and NAME.md and return the table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    date, versions = datetime.date.today().isoformat(), {one: found for one in PACKAGES if (found := _version(one))}
    processor = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    machine = ", ".join([*device.describe(), processor])
    commit = _commit()
    about_run = {"benchmark": name, "date": date, "commit": commit, "machine": machine, "versions": versions}
    result = {**about_run, "rounds": rounds, "rows": rows}
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(
        f"# {name}\n\n{about}\n\n{table}\n{date}, {machine}, {rounds} rounds, {packages}, commit {commit}\n"
    )
    return table


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "" where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
