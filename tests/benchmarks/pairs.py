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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Row = dict[str, str | float]
PACKAGES = ("torch", "megatron-core", "transformers", "trl")


class Seconds(NamedTuple):
    """How long a call took."""

    clock: float
    cpu: float

    @classmethod
    def of(cls, call: Callable[[], object]) -> "Seconds":
        clock, cpu = time.perf_counter(), time.process_time()
        call()
        return cls(time.perf_counter() - clock, time.process_time() - cpu)


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


def interleave(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Seconds]]:
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


def compare(seconds: Mapping[str, Sequence[Seconds]], base: str) -> list[Row]:
    """Return a row for each contestant: its median time, and median and quartiles of its ratio to `base`'s."""
    rows: list[Row] = []
    for name, times in seconds.items():
        pairs = list(zip(times, seconds[base], strict=True))
        ratio = Spread.of([mine.clock / other.clock for mine, other in pairs])
        cpu = Spread.of([mine.cpu / other.cpu for mine, other in pairs])
        clock = statistics.median(mine.clock for mine in times)
        row: Row = {"what": name, "seconds": clock, "ratio": ratio.median, "q1": ratio.low, "q3": ratio.high}
        rows.append(row | {"cpu ratio": cpu.median, "cpu q1": cpu.low, "cpu q3": cpu.high})
    return rows


def write(folder: Path, name: str, title: str, rows: Sequence[Row], rounds: int) -> str:
    """Write rows to NAME.json and NAME.md and return the table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    date, versions = datetime.date.today().isoformat(), {name: found for name in PACKAGES if (found := _version(name))}
    machine = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    about = {"benchmark": name, "date": date, "machine": machine, "versions": versions, "rounds": rounds}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    (folder / f"{name}.md").write_text(
        f"# {name}\n\n{title}\n\n{table}\n{date}, {machine}, {rounds} rounds, {packages}\n"
    )
    return table


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
