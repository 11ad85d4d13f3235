"""Settings shared by all tests."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> "Models":
    from jobs import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def trained(models: "Models", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from jobs import train_models

    return train_models(models, tmp_path_factory.mktemp("reward_models"))


@pytest.fixture(scope="session")
def reward_url(models: "Models") -> Iterator[str]:
    from jobs import reward_server

    with reward_server(models) as url:
        yield url
