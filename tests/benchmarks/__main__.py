"""Runs benchmarks and writes a table and a JSON file of each: python tests/benchmarks [--only NAME ...]"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # for distributed.py

from pairs import Options, write

# memory and scaling fork ranks, which has to come before this process is one
NAMES = (
    "memory", "scaling", "trl_ppo", "generation", "update", "probe", "packing", "servers", "host", "startup", "step",
    "cost_model", "quickstart_run",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant is measured (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--smallest", action="store_true", help="tiny sizes, which show only that everything runs")
    parser.add_argument("--against", type=Path, help="another checkout with a .venv, for startup and step")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of results (%(default)s)")
    arguments = parser.parse_args()
    if len(arguments.only) > 1 and not arguments.smallest:
        for name in arguments.only:  # in a process of its own each, where no other has left memory or threads
            subprocess.run([sys.executable, *sys.argv, "--only", name], check=True)
        return
    torch.set_num_threads(arguments.threads)
    for name in sorted(arguments.only, key=NAMES.index):
        torch.manual_seed(0)
        module = importlib.import_module(name)
        about = str(module.__doc__).strip()
        print(f"{name}: {about}", flush=True)
        rows = module.measure(Options(arguments.rounds, arguments.smallest, arguments.against))
        print(write(arguments.output, name, about, rows, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
