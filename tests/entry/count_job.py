"""A job of its own for the tests of job scripts, and how it is run."""

import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

from nemo_eppo.entry.job import import_nemo

SCRIPT = '''
"""Counts to a number.

Not very useful."""

import atexit, json, os, signal, sys
from typing import Literal
from pydantic import Field
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.entry.job import job
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.run import ExpManagerConfig

HEAVY = {"nemo", "torch", "megatron", "lightning"}
if "pytest" not in sys.modules:
    atexit.register(lambda: print("heavy imports:", sorted(HEAVY & sys.modules.keys())))


class ModelConfig(Config):
    """The thing that counts."""

    hidden_size: int = Field(64, gt=0)
    """Width of the thing."""
    path: str
    """Where the thing comes from."""


class CountConfig(Config):
    """All settings."""

    steps: int = 10
    """How far to count."""
    mode: Literal["up", "down"] = "up"
    """Which way."""
    model: ModelConfig
    extra: dict[str, ModelConfig] = {}
    """More things by name."""
    exp_manager: ExpManagerConfig = ExpManagerConfig()


@job(CountConfig, config_name="count", config_path="conf")
def main(config: CountConfig, run: Run) -> None:
    if config.steps == 13:
        raise ConfigError("steps = 13: an unlucky number")
    if config.steps == 14:
        raise KeyError("a mistake in the code")
    run.logger.info("counting")
    if run.rank == 0:
        with run.open_metrics(resume_step=config.steps - 1) as metrics:
            metrics.log(config.steps, {"count": float(config.steps)})
    facts = {
        "config": config.model_dump(mode="json"),
        "directory": str(run.directory),
        "cwd": os.getcwd(),
        "captured_signals": [s.name for s in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(s) != signal.SIG_DFL],
        "nemo": "nemo" in sys.modules,
    }
    with open(os.environ["FACTS"], "w") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main()
'''
YAML = """
steps: 5
model:
  path: ???
  hidden_size: ${oc.env:WIDTH,32}
exp_manager:
  explicit_log_dir: run
"""


def run_job(script: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of the script in a process of its own."""
    done = subprocess.run(
        [sys.executable, script.name, *arguments],
        cwd=script.parent,
        env={**os.environ, "COLUMNS": "100", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def fork_job(script: Path, *arguments: str, **environment: str) -> tuple[int | None, str]:
    """The same in a process forked from this one, which imports NeMo once for all of them."""
    import_nemo()
    output = script.with_name("forked.txt")
    process = multiprocessing.get_context("fork").Process(
        target=_run_forked, args=(script, arguments, environment, output)
    )
    process.start()
    process.join(120)
    assert not process.is_alive(), output.read_text()
    return process.exitcode, output.read_text()


def _run_forked(script: Path, arguments: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
    os.environ.update(environment)
    os.chdir(script.parent)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  # until the end
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):  # they write to pytest's streams
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
    sys.argv = [script.name, *arguments]
    runpy.run_path(script.name, run_name="__main__")
