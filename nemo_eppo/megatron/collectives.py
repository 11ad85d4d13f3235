"""Work of one rank or one replica whose result, or error, every rank gets."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_eppo.config import ConfigError, RunError
from nemo_eppo.megatron import runtime

ResultT = TypeVar("ResultT")


class PeerError(RunError):
    """Another rank failed; this error carries its message."""

    elsewhere = True


def on_rank0(work: Callable[[], ResultT]) -> ResultT:
    """Run `work` on global rank 0 and return its picklable result on every rank.

    Raises:
        the error of `work` on rank 0, and PeerError with its message on all others, so that none is left waiting.
    """
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as caught:
            error, outcome[1] = caught, f"{type(caught).__name__}: {caught}"
    dist.broadcast_object_list(outcome, src=0, group=runtime.control_group())
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise PeerError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]


def all_or_none(
    work: Callable[[], ResultT],
    group: dist.ProcessGroup | None = None,
    expected: tuple[type[Exception], ...] = (Exception,),
) -> ResultT:
    """Run `work` on every rank of `group` (None for all of the job); if it fails on one, it fails on all.

    Args:
        expected: errors that are held back until all ranks have run `work`; any other ends its process, and so the
            job, at once. Where `work` has collectives of its own, name only errors that leave no rank waiting in one.

    Raises:
        the error of `work` on the ranks where it failed, and PeerError with the first one's message on all others.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except expected as caught:
        error = caught
    group = group or runtime.control_group()
    messages: list[str | None] = [None] * group.size()
    is_own = error is not None and not isinstance(error, PeerError)
    message = f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}" if is_own else None
    dist.all_gather_object(messages, message, group=group)
    if error is not None:
        raise error
    for message in messages:
        if message is not None:
            raise PeerError(message)
    return cast(ResultT, result)


def require_same(what: str, value: object) -> None:
    """Check that `value` is the same on all ranks; `what` names it in the message. Collective over the job.

    Raises:
        ConfigError: this rank's `value` is not that of rank 0; the other ranks raise PeerError.
    """
    first = on_rank0(lambda: value)

    def compare() -> None:
        if value != first:
            raise ConfigError(f"{what}: rank {dist.get_rank()} has other ones than rank 0; expected the same on all")

    all_or_none(compare)


def sibling(
    group: dist.ProcessGroup,
    backend: str | None = None,
    timeout: datetime.timedelta = datetime.timedelta(minutes=runtime.TIMEOUT_MINUTES),
) -> dist.ProcessGroup:
    """Make another group of the same ranks; collective over the job, each rank of which is in one such group.

    NCCL runs the operations of a group, sends and receives included, one after the other. With a sibling, an operation
    that waits does not hold up those of the other group.

    Args:
        backend: None for the job's own; "gloo" for ranks that must not wait on a GPU.
    """
    groups: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(groups, dist.get_process_group_ranks(group), group=runtime.control_group())
    partition = [list(ranks) for ranks in sorted(set(map(tuple, groups)))]
    own, _ = dist.new_subgroups_by_enumeration(partition, timeout, backend)
    return cast(dist.ProcessGroup, own)


def over_replicas(sizes: Sequence[int], work: Callable[[list[int]], Sequence[ResultT]]) -> list[ResultT]:
    """Deal items to the data-parallel replicas, largest first, and gather the results.

    Args:
        sizes: cost of each item, in any unit.
        work: given the indices of this replica's items, returns one result for each; called on all ranks of a replica.

    Returns:
        one result per item, in order, the same on every rank.
    """
    group = parallel_state.get_data_parallel_group()
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    mine = order[group.rank() :: group.size()]
    own = dict(zip(mine, work(mine), strict=True))
    of_replicas: list[Any] = [own] * group.size()
    if group.size() > 1:
        dist.all_gather_object(of_replicas, own, group=group)
    results = {index: result for part in of_replicas for index, result in part.items()}
    return [results[index] for index in range(len(sizes))]
