"""Which requests with a step are due, and what repeated ones are answered: the rules alone, without a server."""

from typing import Any

import numpy as np
import pytest
import torch

from nemo_eppo.servers.protocol import Array, Endpoint, RequestError, StepRule
from nemo_eppo.servers.service import Tensors
from nemo_eppo.servers.steps import Steps

TABLE = {
    "learn": Endpoint({"x": Array(np.float32, ("B",))}, reply="sum", step=StepRule.NEXT),
    "keep": Endpoint({}, reply="kept", step=StepRule.CURRENT),
    "jump": Endpoint({}, reply="at", step=StepRule.SET),
    "look": Endpoint({}, reply="seen", step=StepRule.ANY),
    "ask": Endpoint({"x": Array(np.float32, ("B",))}, reply="sum"),
}


class Counter:
    """A service whose weight is the sum of all it has learnt; it uses up the tensors that it gets."""

    name, vocab_size, max_sequence_length, step, weight = "counter", 1, 1, 0, 0.0

    def __init__(self) -> None:
        self.endpoints = {"learn": self.learn, "keep": self.keep, "jump": self.jump, "look": self.keep, "ask": self.ask}
        self.steps = Steps(self)

    def learn(self, request: Tensors) -> float:
        self.step, self.weight = self.step + 1, self.weight + float(request["x"].sum())
        request["x"].zero_()
        return self.weight

    def keep(self, request: Tensors) -> int:
        return self.step

    def jump(self, request: Tensors) -> int:
        self.step = int(request["step"])
        return self.step

    def ask(self, request: Tensors) -> float:
        return float(request["x"].sum())

    def status(self) -> dict[str, Any]:
        return {}

    def request(self, name: str, step: int | None = None, x: float | None = None) -> Any:
        """What the caller of an endpoint gets, by the three lines of `Steps`."""
        request = {} if step is None else {"step": torch.tensor([step])}
        request |= {} if x is None else {"x": torch.tensor([x, x])}
        answer = self.steps.answered(TABLE[name], request)
        if answer is None:
            answer = self.endpoints[name](request)
            self.steps.done(TABLE[name], request, answer)
        return answer


def test_only_the_next_update_is_made_and_the_last_one_keeps_its_answer() -> None:
    service = Counter()
    assert [service.request("learn", step, 1.0) for step in (1, 2, 2, 2)] == [2.0, 4.0, 4.0, 4.0]
    for step, expected in ((1, "3: the last applied update is 2"), (4, "3: the last applied update is 2")):
        with pytest.raises(RequestError, match=f"step = {step}, expected {expected}"):
            service.request("learn", step, 1.0)
    with pytest.raises(RequestError, match="step = 2, expected 3: update 2 was made with other data"):
        service.request("learn", 2, 1.5)
    assert (service.step, service.weight) == (2, 4.0)


def test_current_is_the_last_update_and_any_is_any() -> None:
    service = Counter()
    service.request("learn", 1, 1.0)
    assert (service.request("keep", 1), service.request("look", 7), service.request("ask", x=1.0)) == (1, 1, 2.0)
    with pytest.raises(RequestError, match="step = 2, expected 1, the last applied update"):
        service.request("keep", 2)
    assert service.request("learn", 1, 1.0) == 2.0  # none of these forgets the last update


def test_a_service_that_was_set_to_an_update_forgets_the_last_one() -> None:
    service = Counter()
    service.request("learn", 1, 1.0)
    assert service.request("jump", 0) == 0
    assert service.request("learn", 1, 1.0) == 4.0  # made, and not answered from memory
    service.request("jump", 1)
    with pytest.raises(RequestError, match="step = 1, expected 2: the last applied update is 1"):
        service.request("learn", 1, 1.0)


@pytest.mark.parametrize("name", ["learn", "jump"])
def test_a_service_that_does_not_stand_where_it_was_told_to_is_reported(name: str) -> None:
    service = Counter()
    service.endpoints[name] = service.keep
    with pytest.raises(RuntimeError, match="the service says step 0 after update 1"):
        service.request(name, 1)
