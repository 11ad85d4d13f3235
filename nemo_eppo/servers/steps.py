"""The order of a service's updates: which request with a `step` may be executed, and how a repeated one is answered."""

import zlib
from typing import Any

from nemo_eppo.servers.protocol import Endpoint, RequestError, StepRule
from nemo_eppo.servers.service import Service, Tensors


class Steps:
    """Applies the step rules of endpoints to the requests for one service, in a server or without one.

        answer = steps.answered(endpoint, request)
        if answer is None:
            answer = service.endpoints[name](request)
            steps.done(endpoint, request, answer)

    Ranks that do this with the same requests get the same answers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._next_digest = 0  # of the next update's request, taken before the service may change its tensors
        self._last_update: tuple[int, int, Any] | None = None  # step, digest of its request, answer

    def answered(self, endpoint: Endpoint, request: Tensors) -> Any:
        """Return the last update's answer if the request repeats it; None if the request has to be executed.

        Raises:
            RequestError: the endpoint's rule does not allow this step.
        """
        if endpoint.step not in (StepRule.NEXT, StepRule.CURRENT):
            return None
        step, last = int(request["step"]), self._service.step
        if endpoint.step == StepRule.CURRENT:
            if step != last:
                raise RequestError("step", step, f"{last}, the last applied update")
            return None
        digest = _digest(request)
        if step == last + 1:
            self._next_digest = digest
            return None
        if self._last_update and step == self._last_update[0]:
            if digest != self._last_update[1]:
                raise RequestError("step", step, f"{last + 1}: update {last} was made with other data")
            return self._last_update[2]
        raise RequestError("step", step, f"{last + 1}: the last applied update is {last}")

    def done(self, endpoint: Endpoint, request: Tensors, answer: Any) -> None:
        """Record that the service has executed a request, and its answer.

        Raises:
            RuntimeError: the service's last update is not the one that the request asked for.
        """
        if endpoint.step not in (StepRule.NEXT, StepRule.SET):
            return
        step = int(request["step"])
        if self._service.step != step:
            raise RuntimeError(f"the service says step {self._service.step} after update {step}")
        # Setting a service to an update may have undone the last one.
        self._last_update = (step, self._next_digest, answer) if endpoint.step == StepRule.NEXT else None


def _digest(request: Tensors) -> int:
    checksum = 0
    for tensor in request.values():
        checksum = zlib.crc32(tensor.numpy(force=True).tobytes(), checksum)
    return checksum
