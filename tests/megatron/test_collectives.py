"""Work done by one rank or replica reaches all: results, and errors."""

import datetime
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import device, runtime
from nemo_eppo.megatron.collectives import PeerError, on_rank0, over_replicas, require_same, sibling
from nemo_eppo.settings.model import ParallelConfig


def _on_rank0() -> tuple[str, str]:
    runtime.initialize(ParallelConfig(), 1)
    calls: list[int] = []

    def work() -> str:
        calls.append(dist.get_rank())
        return "done"

    result = on_rank0(work)
    assert calls == ([0] if dist.get_rank() == 0 else [])

    def fail() -> None:
        raise ConnectionError("http://127.0.0.1:1 is gone")

    try:
        on_rank0(fail)
    except (ConnectionError, PeerError) as error:
        return result, f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def test_rank_0s_result_and_error_reach_every_rank() -> None:
    first, second = run_ranks(_on_rank0, 2)
    assert first == ("done", "ConnectionError: http://127.0.0.1:1 is gone")
    assert second == ("done", "PeerError: rank 0 failed: ConnectionError: http://127.0.0.1:1 is gone")


def _on_a_slow_rank0() -> str:
    runtime.initialize(ParallelConfig(), 1, timeout_minutes=1 / 20)

    def work() -> str:
        time.sleep(6)
        return "done"

    return on_rank0(work)


def timeouts() -> list[float]:
    from megatron.core import parallel_state  # after nemo_eppo.megatron

    runtime.initialize(ParallelConfig(tensor_model_parallel_size=2), 1, timeout_minutes=7)
    own = parallel_state.get_tensor_model_parallel_group()
    groups: list[Any] = [dist.group.WORLD, own, sibling(own)]
    return [group._get_backend(device.CPU).options._timeout.total_seconds() / 60 for group in groups]


def test_no_group_has_a_timeout_of_its_own() -> None:
    assert run_ranks(timeouts, 2) == [[7.0, 7.0, runtime.TIMEOUT_MINUTES]] * 2


def test_what_rank_0_does_for_all_may_take_longer_than_a_collective() -> None:
    assert run_ranks(_on_a_slow_rank0, 2) == ["done", "done"]


def _over_replicas(tensor_ranks: int) -> tuple[list[int], list[str]]:
    runtime.initialize(ParallelConfig(tensor_model_parallel_size=tensor_ranks), 1)
    mine: list[int] = []

    def work(indices: list[int]) -> list[str]:
        mine.extend(indices)
        return [f"item {index}" for index in indices]

    return mine, over_replicas([3, 9, 1, 7, 5], work)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_items_are_shared_by_the_replicas_and_come_back_in_order(tensor_ranks: int) -> None:
    results = run_ranks(_over_replicas, 2, tensor_ranks)
    assert all(items == [f"item {index}" for index in range(5)] for _, items in results)
    shares = [sorted(mine) for mine, _ in results]
    assert shares == ([[1, 2, 4], [0, 3]] if tensor_ranks == 1 else [[0, 1, 2, 3, 4]] * 2)


def _same_and_not() -> str:
    runtime.initialize(ParallelConfig(), 1)
    require_same("rows", "those of all")
    try:
        require_same("rows", dist.get_rank() // 2)
    except (ConfigError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def test_ranks_that_read_other_rows_are_named() -> None:
    said = "rows: rank 2 has other ones than rank 0; expected the same on all"
    found = run_ranks(_same_and_not, 3)
    assert found == [*[f"PeerError: rank 2 failed: ConfigError: {said}"] * 2, f"ConfigError: {said}"]


def _siblings() -> tuple[list[int], bool, float]:
    runtime.initialize(ParallelConfig(), 1)
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    other, number = sibling(group), torch.tensor(float(dist.get_rank()))
    dist.all_reduce(number, group=other)
    return dist.get_process_group_ranks(other), other is group, float(number)


def test_a_sibling_has_the_same_ranks_but_is_another_group() -> None:
    even, odd = ([0, 2], False, 2.0), ([1, 3], False, 4.0)
    assert run_ranks(_siblings, 4) == [even, odd, even, odd]


def _waiting_sibling() -> tuple[list[int], str, datetime.timedelta, float]:
    from megatron.core import parallel_state  # after nemo_eppo.megatron

    runtime.initialize(ParallelConfig(tensor_model_parallel_size=2), 1)
    group = parallel_state.get_model_parallel_group()
    other, number = sibling(group, "gloo", runtime.PATIENCE), torch.tensor(float(dist.get_rank()))
    dist.all_reduce(number, group=other)
    patience = other._get_backend(torch.device("cpu")).options._timeout
    return dist.get_process_group_ranks(other), dist.get_backend(other), patience, float(number)


def test_a_sibling_may_have_a_backend_and_a_timeout_of_its_own() -> None:
    first, second = ([0, 1], "gloo", runtime.PATIENCE, 1.0), ([2, 3], "gloo", runtime.PATIENCE, 5.0)
    assert run_ranks(_waiting_sibling, 4) == [first, first, second, second]
