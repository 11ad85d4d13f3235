"""All ranks do the same thing or all end: the loop below the server, with a list of requests in Triton's place."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.intake import Intake, Request
from nemo_eppo.servers.protocol import ServiceError
from nemo_eppo.servers.server import _run, _stop_signals, serve
from nemo_eppo.settings.servers import ServerConfig


class Adder:
    name, vocab_size, max_sequence_length, step = "critic", 10, 10, 0

    def __init__(self, fail_on: tuple[int, ...] = ()) -> None:
        self.fail_on = fail_on
        self.asked = threading.Semaphore(0)
        self.endpoints = {"critic_infer": self.infer}

    def infer(self, arrays: dict[str, torch.Tensor]) -> Any:
        self.asked.release()
        total = arrays["tokens"].clone()
        dist.all_reduce(total)
        if dist.get_rank() in self.fail_on:
            raise ServiceError("not a number")
        return {name: (str(x.dtype), x.is_contiguous()) for name, x in arrays.items()} | {"total": total}

    def status(self) -> dict[str, Any]:
        return {}


class ListIntake:
    """Gives its requests one by one, a heartbeat after each, then heartbeats for ever."""

    def __init__(self, requests: list[Request]) -> None:
        self.items: Iterator[Request | None] = iter([item for request in requests for item in (request, None)])
        self.outcomes: list[Any] = []

    def next_request(self, timeout: float) -> Request | None:
        return next(self.items, None)

    def resolve(self, request: Request, outcome: Any) -> None:
        self.outcomes.append(outcome)


def run(fail_on: tuple[int, ...], stopping_rank: int | None) -> Any:
    dist.init_process_group("gloo")
    tokens = np.arange(12, dtype=np.int32).reshape(3, 4).T  # not C-contiguous
    arrays: dict[str, np.ndarray] = {"tokens": tokens, "mask": np.eye(4, dtype=np.uint8), "returns": np.ones(2, "f4")}
    intake = ListIntake([Request("critic_infer", ENDPOINTS["critic_train"].decode(arrays))] * 2)
    lead = cast(Intake, intake) if dist.get_rank() == 0 else None
    service = Adder(fail_on)

    def stop_in_the_second_request() -> None:
        for _ in range(2):
            service.asked.acquire()
        os.kill(os.getpid(), signal.SIGTERM)

    with _stop_signals() as stop:
        if dist.get_rank() == stopping_rank:
            threading.Thread(target=stop_in_the_second_request).start()
        try:
            _run(service, dist.new_group(), stop, lead)
        except RuntimeError as error:
            time.sleep(1)  # so that the other ranks see the same, and not this one's end
            return str(error)
    return intake.outcomes


@pytest.mark.parametrize("stopping_rank", [0, 1, 2])
def test_every_rank_gets_the_same_arrays_until_any_rank_is_told_to_stop(stopping_rank: int) -> None:
    outcomes, *others = run_ranks(run, 3, (), stopping_rank)
    assert others == [[], []]
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert torch.equal(outcome["total"], 3 * torch.arange(12).reshape(3, 4).T)
        assert outcome["tokens"] == ("torch.int64", True)
        assert outcome["mask"] == ("torch.bool", True)
        assert outcome["returns"] == ("torch.float32", True)


def test_failure_on_all_ranks_is_an_outcome() -> None:
    outcomes = run_ranks(run, 2, (0, 1), 1)[0]
    assert [str(outcome) for outcome in outcomes] == ["not a number"] * 2


def test_failure_on_some_ranks_ends_all_of_them_with_an_explanation() -> None:
    messages = run_ranks(run, 3, (1,), None)
    assert messages[1] == "a request failed on 1 of 3 ranks, here with: not a number"
    assert messages[0] == messages[2] == "a request failed on 1 of 3 ranks, but not here"


@pytest.mark.timeout(30)  # seconds; a handler that takes a lock waits for itself
def test_a_signal_may_arrive_while_another_one_is_handled() -> None:
    interrupted = 0

    def interrupt(frame: Any, event: str, argument: Any) -> Any:
        """Send another signal at every line that the handler runs; Python does not trace what a tracer calls."""
        nonlocal interrupted
        if event == "line" and frame.f_globals.get("__name__") in ("threading", _stop_signals.__module__):
            interrupted += 1
            signal.raise_signal(signal.SIGTERM)
        return interrupt

    with _stop_signals() as stop:
        sys.settrace(interrupt)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            sys.settrace(None)
    assert interrupted
    assert stop.asked


def test_server_runs_in_the_main_thread_only() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            serve(Adder(), {}, ServerConfig(), group=cast(dist.ProcessGroup, None))
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
