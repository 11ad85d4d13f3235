"""Seconds of a PPO step and its phases as `nemo-eppo launch` runs it: EPPO, its critic and reward model as servers.

With --against, both checkouts run the same launch file in turn, who begins changes from round to round, and ratios of
here to there are told with their quartiles; each needs an environment in .venv of its own. A launch's time of a phase
is the median of its steps but the first. The settings are few, so that an old checkout knows them. Phases of less than
a tenth of a step, and those that only one of both has, are left out.
"""

import tempfile
from pathlib import Path
from statistics import median

from cost_model import LARGE, launch_file, run
from pairs import Options, Row, Spread
from trl_ppo import PHASES, Work

NAMES = {"step"}.union(*PHASES.values())
STEPS = 4
"""Steps of a launch that count."""


def measure(options: Options) -> list[Row]:
    checkouts: dict[str, Path | None] = {"here": None}
    if options.against:
        checkouts["other"] = options.against.resolve()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), STEPS, options.smallest)
        file = launch_file(work, {"servers": 1}, {"method": "eppo"}, options.smallest)
        for number in range(options.rounds):
            for name in sorted(checkouts, reverse=bool(number % 2)):
                steps = run(file, checkouts[name])[1:]
                found[name].append({phase: median(step[phase] for step in steps) for phase in steps[0]})
    rows: list[Row] = []
    firsts = [rounds[0] for rounds in found.values()]
    shared = NAMES.intersection(*firsts)
    large = {name for first in firsts for name in first if first[name] >= LARGE * first["step"]}
    for phase in sorted(shared & large, key=list(firsts[0]).index):
        row: Row = {"what": phase}
        for name, rounds in found.items():
            row[f"{name} s"] = median(one[phase] for one in rounds)
        if options.against:
            ratio = Spread.of([here[phase] / other[phase] for here, other in zip(*found.values(), strict=True)])
            row |= {"ratio": ratio.median, "q1": ratio.low, "q3": ratio.high}
        rows.append(row)
    return rows
