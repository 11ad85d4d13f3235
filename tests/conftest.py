"""Settings shared by all tests."""

import fcntl
import gc
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked ranks share two cores
# set at all, so that NeMo does not: with its value a forked process that tokenises waits for threads it does not have
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which some of its functions want
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

if TYPE_CHECKING:
    from jobs import Models

torch.set_num_threads(1)
Made = TypeVar("Made")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """From training's files, which take minutes, to those of algorithms: no long one is left alone at the end."""
    items.sort(key=lambda item: str(item.path), reverse=True)


def pytest_collection_finish() -> None:
    """What has been imported for all tests is left alone when a rank forked from here collects its garbage."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """Commands that a test runs in this process set the logger up; the next test finds it as it was."""
    logger = logging.getLogger("nemo_eppo")
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers


# Once for all folders; their makers bring Megatron, which many tests do without.


def _made_once(name: str, make: Callable[[Path], Made], folders: pytest.TempPathFactory) -> Made:
    """What `make` returns, which fills a folder: the first of pytest-xdist's workers makes it, for all of them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make(folders.mktemp(name))
    folder = folders.getbasetemp().parent / name
    result = folder.with_suffix(".pickle")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # of this process: those that `make` forks do not hold it
        if not result.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            result.write_bytes(pickle.dumps(make(folder)))
        made: Made = pickle.loads(result.read_bytes())
    return made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> "Models":
    from jobs import make_models

    return _made_once("models", make_models, tmp_path_factory)


@pytest.fixture(scope="session")
def trained(models: "Models", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from jobs import train_models

    return _made_once("reward_models", partial(train_models, models), tmp_path_factory)


@pytest.fixture(scope="session")
def reward_url(models: "Models", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from jobs import reward_server

    with reward_server(models, tmp_path_factory.mktemp("reward_server") / "job") as url:
        yield url
