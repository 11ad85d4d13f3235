"""Settings shared by all tests."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked ranks share two cores
# set at all, so that NeMo does not: with its value a forked process that tokenises waits for threads it does not have
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

torch.set_num_threads(1)


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
