"""Runs a command with a bad input and says what it must do: end with one clear message, having done nothing.

Importing NeMo, torch and transformers takes most of a command's time. Here it is done once, and every command runs in
a process forked from this one.
"""

import gc
import importlib
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_eppo.cli import main
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.entry import job
from nemo_eppo.megatron import device, model

device.install()  # before NeMo imports megatron-core
for _module in (
    "datasets",
    "lightning.pytorch",
    "nemo.core.config",
    "nemo.utils.exp_manager",
    "nemo_eppo.evaluation.score",
    "nemo_eppo.launch.examination",
    "nemo_eppo.launch.local",
    "nemo_eppo.tools.aligner_config",
    "nemo_eppo.tools.convert",
    "nemo_eppo.tools.preparation",
    "nemo_eppo.training.ppo_loop",
    "transformers",
    "tritonclient.grpc",
):
    importlib.import_module(_module)

SCRIPTS = Path(__file__).parents[2] / "examples" / "nlp" / "gpt"
SECONDS = 60.0  # in which a command has to end; it takes less than one when the machine is idle
LINES = 8  # most lines of a message; the usage that argparse prints, and what doctor finds in order, do not count
BUILT = "a model was built"

Contents = Mapping[str, str | bytes | None]
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Row:
    """One bad input: what is wrong with it, the command, and the message as a regular expression."""

    wrong: str
    command: str
    """Arguments; those of scripts are added to, or replace, the ones that `BASE` gives every command of the script."""
    message: str
    files: Contents = field(default_factory=dict)
    """Files to be in the working directory; None makes a directory."""
    change: tuple[str, Change] | None = None
    """What is done to a copy of a model or of the data."""
    status: int = 2

    def __str__(self) -> str:
        return self.wrong


def prepare(world: Path, directory: Path, row: Row) -> None:
    """Fill the working directory: links to the models and data of `world`, and the row's own files."""
    for source in world.iterdir():
        (directory / source.name).symlink_to(source)
    if row.change is not None:
        name, change = row.change
        (directory / name).unlink()
        shutil.copytree(world / name, directory / name)
        change(directory / name)
    for name, content in row.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def run(command: str, directory: Path, rank: int = 0) -> tuple[int, str]:
    """Exit status and output of a command line, `nemo-eppo ...` or the name of a script and its arguments.

    Rank 0 of a script runs through NeMo, which takes three times as long as what rank 1 does.
    """
    log = directory.parent / "output"
    gc.freeze()  # so that the child does not copy every page that a collection would touch
    process = os.fork()
    if process == 0:
        _child(shlex.split(command), directory, log, rank)
    end = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"{command} has not ended within {SECONDS:g} s: {log.read_text()[-2000:]}")
        time.sleep(0.01)


def _child(arguments: list[str], directory: Path, log: Path, rank: int) -> None:
    """Run a command in this process, which ends with it."""
    status: int | str | None = 1
    try:
        os.setpgid(0, 0)
        os.chdir(directory)
        if rank:
            os.environ["RANK"] = str(rank)
            job._PATIENCE = 0  # other ranks leave rank 0 this time to tell first
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  # until the end
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):  # they write to pytest's streams
            if isinstance(logger, logging.Logger):
                logger.handlers.clear()
        model._Decoder.__init__ = _refuse  # type: ignore[method-assign]
        name, *rest = arguments
        if name == "nemo-eppo":
            status = main(rest)
        else:
            script = str(SCRIPTS / f"{name}.py")
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")
            status = 0
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


def _refuse(*arguments: object, **settings: object) -> None:
    raise AssertionError(BUILT)


def check(row: Row, command: str, world: Path, directory: Path, rank: int = 0) -> None:
    """The command fails with the row's message, of few lines and without a stack, before a model is built.

    It leaves behind nothing but, of a script, a run directory without checkpoints.
    """
    prepare(world, directory, row)
    before = files_below(directory)
    status, output = run(command, directory, rank)
    said = re.sub(r"^(?:usage:|ok ).*\n(?:[ \t]+.*\n)*", "", output, flags=re.MULTILINE)  # of argparse and of doctor
    print(f"[{status}] {command}\n{said}")
    assert "Traceback" not in output, output
    assert status == row.status, output
    assert re.search(row.message, " ".join(said.split())), said
    assert len(said.splitlines()) <= LINES, said
    new = files_below(directory) - before
    assert not {path for path in new if path.parts[0] != "run" or "checkpoints" in path.parts}, new


def files_below(directory: Path) -> set[Path]:
    """All files and directories below a directory, without those that links lead to."""
    return {path.relative_to(directory) for path in directory.rglob("*")}


def rows(*given: Any) -> dict[str, str]:
    """A file of JSON lines; text is written as it is."""
    return {"rows.jsonl": "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in given)}


def edited(file: str, **changes: Any) -> Any:
    """A change of values of a JSON file, None removes one."""

    def change(directory: Path) -> None:
        path = directory / file
        content = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value is not None}
        path.write_text(json.dumps(content))

    return change


def written(file: str, content: str) -> Any:
    return lambda directory: (directory / file).write_text(content)


def removed(file: str) -> Any:
    def change(directory: Path) -> None:
        path = directory / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def truncated(directory: Path) -> None:
    largest = max((directory / "weights").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)


def other_tokenizer(directory: Path) -> None:
    shutil.rmtree(directory)
    word_level(["red", "green"], directory)


def tensors(**changes: torch.Tensor | None) -> Any:
    """A change of the tensors of a Hugging Face directory; None removes one."""

    def change(directory: Path) -> None:
        for file in directory.glob("*.safetensors"):
            held = load_file(file)
            for name, tensor in changes.items():
                key = next((key for key in held if key.endswith(name.replace("__", "."))), None)
                if key is not None and tensor is None:
                    del held[key]
                elif key is not None and tensor is not None:
                    held[key] = tensor
            save_file(held, file, metadata={"format": "pt"})

    return change


_FIT = "fit.global_batch_size=4 exp_manager.explicit_log_dir=run"
BASE = {
    "train_gpt_sft": "model.restore_from_path=sft data.train=data/sft.train.jsonl "
    f"data.validation=data/sft.validation.jsonl {_FIT}",
    "train_reward_model": "model.restore_from_path=sft data.train=data/preferences.train.jsonl "
    f"data.validation=data/preferences.validation.jsonl {_FIT}",
    "train_gpt_ppo_actor": "model.restore_from_path=sft data.train=data/prompts.train.jsonl data.max_prompt_length=16 "
    "generation.max_new_tokens=20 ppo.max_steps=1 ppo.rollout_batch_size=8 ppo.mini_batch_size=8 "
    "exp_manager.explicit_log_dir=run",
    "serve_ppo_critic": "model.restore_from_path=rm server.port=0 exp_manager.explicit_log_dir=run",
    "serve_reward_model": "model.restore_from_path=rm server.port=0 exp_manager.explicit_log_dir=run",
}
"""Arguments with which each script runs."""


def command(script: str, arguments: str) -> str:
    """The script's command line: what `BASE` has, but for the keys that the arguments set."""
    given = {argument.partition("=")[0].lstrip("+~") for argument in arguments.split()}
    kept = [argument for argument in BASE[script].split() if argument.partition("=")[0] not in given]
    return " ".join([script, *kept, arguments])
