"""The wire protocol between an actor and its servers: what an endpoint is, and how its tensors travel as arrays.

Every endpoint gives either its outputs or `error` (bytes [1], a JSON object with field, value, expected and message).
The only endpoint here is `STATUS`, which every server has; those of the critic and reward servers are in
`endpoints.py`. Requests are checked by the server, and answers by the client, against the same tables.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from nemo_eppo.config import RunError

PROTOCOL_VERSION = 2

Arrays = Mapping[str, np.ndarray]


class ServiceError(RunError):
    """A request failed on all ranks alike and did not change the service; the client gets the message."""

    field = value = expected = ""

    def payload(self) -> dict[str, str]:
        """Return the JSON object of `error`."""
        return {"field": self.field, "value": self.value, "expected": self.expected, "message": str(self)}


class ServerEnding(ServiceError):
    """The server ends and drops the request; clients treat it as a server that does not answer."""

    field = "server"


class RequestError(ServiceError):
    """A field of a request is wrong; the message has the field, its value and what was expected."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} = {value}, expected {expected}")
        self.field, self.value, self.expected = field, str(value), expected


@dataclass(frozen=True)
class Array:
    """One array of an endpoint."""

    dtype: type[np.generic]
    """Data type in requests and answers."""
    shape: tuple[str, ...]
    """A symbol for each dimension: B sequences, S tokens, T = S - 1 actions, 1 for exactly one; others are free."""
    tensor: torch.dtype = torch.float32
    """Data type of the tensor that the service gets or gives."""
    optional: bool = False
    """Whether it may be left out, as it is if it would be empty (Triton refuses empty arrays)."""

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype)} [{', '.join(self.shape)}]"

    def encode(self, name: str, tensor: torch.Tensor) -> np.ndarray:
        """Return a tensor as C-contiguous array; RequestError if it is not of the expected kind (int, float, bool)."""
        wanted = _kind(self.tensor)
        if _kind(tensor.dtype) != wanted:
            raise RequestError(name, tensor.dtype, wanted)
        if self.dtype == np.int32:  # a number that int32 cannot hold stays invalid, so that the server refuses it
            tensor = tensor.clamp(-1, 2**31 - 1)
        if wanted == "float":  # numpy knows no bfloat16
            tensor = tensor.detach().float()
        return np.ascontiguousarray(tensor.cpu().numpy(), self.dtype)


def _kind(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


class StepRule(StrEnum):
    """What `step`, the number of an update, means in a request. A service counts its updates from 1."""

    NEXT = "next"
    """The request makes this update, which must be the next one; a repetition of the last one gets its old answer."""
    CURRENT = "current"
    """This must be the last update made."""
    SET = "set"
    """Any update >= 0, which is the service's last one afterwards."""
    ANY = "any"
    """Any update >= 0."""


@dataclass(frozen=True)
class Limits:
    """The largest requests that a server accepts."""

    vocab_size: int
    max_sequence_length: int
    max_batch_size: int


@dataclass(frozen=True)
class Endpoint:
    """One function of a server. Without a step all its inputs are [B, ...], and a client may split them along B."""

    inputs: dict[str, Array]
    outputs: dict[str, Array] = field(default_factory=dict)
    reply: str = ""
    """Name of the JSON output that replaces `outputs`; empty: none."""
    reply_type: type = dict
    """Type of the reply's value."""
    step: StepRule | None = None
    """Adds the input `step`, int64 [1], with this meaning; None: no such input."""
    check: Callable[[Arrays, Limits], None] | None = None
    """Raises RequestError for wrong values in inputs whose names, dtypes and shapes are right."""

    def __post_init__(self) -> None:
        if self.step:
            object.__setattr__(self, "inputs", {**self.inputs, "step": Array(np.int64, ("1",), torch.int64)})

    def validate(self, arrays: Arrays, limits: Limits) -> None:
        """Check a request completely, on rank 0 and before any other rank knows of it.

        Raises:
            RequestError: a field is wrong; the message has its name (and position), its value and what was expected.
        """
        check_arrays(self.inputs, arrays)
        if self.step:
            refuse_where(arrays["step"] < 0, "step", arrays["step"], "a step count >= 0")
        if self.check:
            self.check(arrays, limits)

    def encode(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Turn a request's tensors into arrays; RequestError if one is unknown or of another kind than expected."""
        return _encode(self.inputs, tensors)

    def decode(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        """Copy a valid request's arrays into contiguous tensors, because Triton reuses the arrays' memory."""
        return {
            name: torch.from_numpy(np.array(arrays[name], order="C")).to(array.tensor)
            for name, array in self.inputs.items()
            if name in arrays
        }

    def answer(self, result: Any) -> dict[str, np.ndarray]:
        """Turn the result of the service's function into arrays; TypeError if its tensors do not fit `outputs`."""
        if self.reply:
            return {self.reply: json_array(result)}
        try:
            arrays = _encode(self.outputs, result)
            arrays = {name: array for name, array in arrays.items() if array.size or not self.outputs[name].optional}
            check_arrays(self.outputs, arrays)
        except RequestError as error:
            raise TypeError(f"the service's own output does not fit: {error}") from None
        return arrays

    def check_answer(self, answer: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        """Check what a server answered to a request whose arrays have these `sizes`, see `check_arrays`.

        Raises:
            RequestError: an output is missing, unknown, or of another type or shape than expected.
        """
        if not self.reply:
            check_arrays(self.outputs, answer, sizes)
            return
        value = answer.get(self.reply)
        if len(answer) != 1 or type(value) is not self.reply_type:
            found = {name: type(item).__name__ for name, item in answer.items()}
            raise RequestError(self.reply, found, f"one JSON value of type {self.reply_type.__name__}")


STATUS = Endpoint({}, reply="status")
"""Asks whether a server is healthy and what it serves; see `Intake`."""


def check_arrays(spec: Mapping[str, Array], arrays: Arrays, known: Mapping[str, int] | None = None) -> dict[str, int]:
    """Check names, dtypes and shapes of `arrays` against `spec`, but not their values.

    Args:
        known: sizes that are known before, such as those of the request that `arrays` answer.

    Returns:
        The size of every symbol, with S in place of T.

    Raises:
        RequestError: an array is missing, unknown, empty, of another dtype or rank, or does not fit the others.
    """
    _refuse_unknown(spec, arrays)
    sizes = dict(known or {})
    for name, wanted in spec.items():
        array = arrays.get(name)
        if array is None:
            if wanted.optional:
                continue
            raise RequestError(name, "missing", str(wanted))
        if array.dtype != wanted.dtype or array.ndim != len(wanted.shape):
            raise RequestError(name, f"{array.dtype} of shape {list(array.shape)}", str(wanted))
        for symbol, size in zip(wanted.shape, array.shape, strict=True):
            if size == 0:
                raise RequestError(name, f"shape {list(array.shape)}", f"{wanted}, nothing empty")
            key, length = ("S", size + 1) if symbol == "T" else (symbol, size)
            if length != sizes.setdefault(key, 1 if symbol == "1" else length):
                fixed = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
                raise RequestError(name, f"shape {list(array.shape)}", f"{wanted} with {fixed}")
    return sizes


def _refuse_unknown(spec: Mapping[str, Array], names: Iterable[str]) -> None:
    for name in names:
        if name not in spec:
            raise RequestError(name, "an array", f"none of this name (known: {', '.join(spec)})")


def _encode(spec: Mapping[str, Array], tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    _refuse_unknown(spec, tensors)
    return {name: spec[name].encode(name, tensor) for name, tensor in tensors.items()}


def refuse_where(wrong: np.ndarray, name: str, array: np.ndarray, expected: str) -> None:
    """Raise RequestError for the first element of `array` where `wrong`, of the same shape, is true."""
    if wrong.any():
        position = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise RequestError(f"{name}[{', '.join(map(str, position))}]", array[position], expected)


def json_array(value: Any) -> np.ndarray:
    """Turn a JSON value into a bytes array [1], the form of `error` and of an endpoint's `reply`."""
    return np.array([json.dumps(value).encode()], dtype=np.object_)
