"""Runs benchmarks and writes a table and a JSON file of each: python tests/benchmarks [--only NAME ...]"""

import argparse
import importlib
from pathlib import Path

import torch
from pairs import write

NAMES = ("trl_ppo",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant is measured (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--smallest", action="store_true", help="tiny sizes, which show only that everything runs")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of results (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only:
        module = importlib.import_module(name)
        about = str(module.__doc__).strip()
        print(f"{name}: {about}", flush=True)
        rows = module.measure(arguments.rounds, arguments.smallest)
        print(write(arguments.output, name, about, rows, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
