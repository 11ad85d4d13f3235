"""The wire protocol between the actor and the critic and reward servers: endpoints, their arrays, and what is valid.

Every endpoint takes, beside its own arrays, `token` (bytes [1], the shared secret or empty) and gives either its
outputs or `error` (bytes [1], a JSON object with field, value, expected and message). Shapes are written in symbols:
B sequences, S tokens, T = S-1 actions, K reward models, D latent dimensions, 1 exactly one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PROTOCOL_VERSION = 1

Arrays = Mapping[str, np.ndarray]


class ServiceError(RuntimeError):
    """A request failed on all ranks alike and left the service as it was; the client gets the message."""

    def payload(self) -> dict[str, str]:
        return {"field": "", "value": "", "expected": "", "message": str(self)}


class RequestError(ServiceError):
    """A field of a request is wrong: names the field, its value and what was expected."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} = {value}, expected {expected}")
        self.field, self.value, self.expected = field, str(value), expected

    def payload(self) -> dict[str, str]:
        return {"field": self.field, "value": self.value, "expected": self.expected, "message": str(self)}


@dataclass(frozen=True)
class Array:
    """One array of an endpoint. An optional one is left out where it would be empty (Triton refuses empty arrays)."""

    dtype: type[np.generic]
    shape: tuple[str, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype)} [{', '.join(self.shape)}]"


@dataclass(frozen=True)
class Endpoint:
    """One function of a server. `reply`, if set, is the name of a JSON output that takes the place of `outputs`."""

    inputs: dict[str, Array]
    outputs: dict[str, Array] = field(default_factory=dict)
    reply: str = ""


_TOKENS = Array(np.int32, ("B", "S"))
_PER_SEQUENCE = Array(np.int32, ("B",))
_PER_ACTION = Array(np.float32, ("B", "T"))
_MASK = Array(np.uint8, ("B", "T"))
_STEP = Array(np.int64, ("1",))

ENDPOINTS = {
    "critic_infer": Endpoint({"tokens": _TOKENS, "lengths": _PER_SEQUENCE}, {"values": _PER_ACTION}),
    # One mini-batch is one optimizer step. `values` are the old values (of the rollout), `step` counts updates from 1.
    "critic_train": Endpoint(
        {
            "tokens": _TOKENS,
            "lengths": _PER_SEQUENCE,
            "returns": _PER_ACTION,
            "values": _PER_ACTION,
            "mask": _MASK,
            "step": _STEP,
        },
        reply="metrics",
    ),
    # The run `run` begins, or goes on, after update `step`: the critic goes back to it if it is further.
    "critic_begin": Endpoint({"step": _STEP, "run": _STEP}, reply="step"),
    # Starts saving update `step`, and drops all earlier checkpoints but those of the updates `keep` (0: the start).
    "critic_save": Endpoint({"step": _STEP, "keep": Array(np.int64, ("K",))}, reply="path"),
    # Answers once what `critic_save` started is complete.
    "critic_saved": Endpoint({"step": _STEP}, reply="path"),
    "reward_infer": Endpoint(
        {"tokens": _TOKENS, "prompt_lengths": _PER_SEQUENCE, "lengths": _PER_SEQUENCE},
        {"rewards": Array(np.float32, ("B", "K")), "latents": Array(np.float32, ("B", "D"), optional=True)},
    ),
    "status": Endpoint({}, reply="status"),
}


@dataclass(frozen=True)
class Limits:
    """What a server accepts."""

    vocab_size: int
    max_sequence_length: int
    max_batch_size: int


def check_arrays(spec: Mapping[str, Array], arrays: Arrays, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Check names, dtypes and shapes of `arrays` against `spec`; their values are not looked at.

    Args:
        sizes: sizes of symbols that are known beforehand, e.g. `{"B": 4, "S": 16}`.

    Returns:
        The size of every symbol; T is given as S.

    Raises:
        RequestError: an array is missing, unknown, empty, of another dtype or rank, or does not fit the others.
    """
    for name in arrays:
        if name not in spec:
            raise RequestError(name, "an array", f"none of this name (known: {', '.join(spec)})")
    found = dict(sizes or {})
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
            if length != found.setdefault(key, 1 if symbol == "1" else length):
                known = ", ".join(f"{symbol} = {size}" for symbol, size in found.items())
                raise RequestError(name, f"shape {list(array.shape)}", f"{wanted} with {known}")
    return found


def validate_request(endpoint: str, arrays: Arrays, limits: Limits) -> None:
    """Check a request completely: it runs on rank 0 before any rank hears of the request.

    Raises:
        RequestError: names the first wrong field (an element by its position), its value and what was expected.
    """
    sizes = check_arrays(ENDPOINTS[endpoint].inputs, arrays)
    if "step" in arrays:
        _refuse("step", arrays["step"], arrays["step"] < 0, "a step count >= 0")
    if "tokens" not in arrays:
        return
    tokens, lengths = arrays["tokens"], arrays["lengths"]
    for symbol, limit, what in (
        ("B", limits.max_batch_size, "sequences (max_batch_size)"),
        ("S", limits.max_sequence_length, "tokens each (max_sequence_length)"),
    ):
        if sizes[symbol] > limit:
            raise RequestError("tokens", f"shape {list(tokens.shape)}", f"at most {limit} {what}")
    _refuse("tokens", tokens, (tokens < 0) | (tokens >= limits.vocab_size), f"a token id in [0, {limits.vocab_size})")
    _refuse("lengths", lengths, (lengths < 2) | (lengths > sizes["S"]), f"a length in [2, {sizes['S']}]")
    if "prompt_lengths" in arrays:
        prompts = arrays["prompt_lengths"]
        _refuse("prompt_lengths", prompts, (prompts < 1) | (prompts >= lengths), "at least 1 and less than the length")
    if "mask" in arrays:
        mask = arrays["mask"]
        _refuse("mask", mask, mask > 1, "0 or 1")
        padding = np.arange(1, sizes["S"]) >= lengths[:, None]
        _refuse("mask", mask, (mask == 1) & padding, "0 on padding: action t predicts token t+1 < length")
        if not mask.any():
            raise RequestError("mask", "all 0", "at least one response token")
        for name in ("returns", "values"):
            _refuse(name, arrays[name], (mask == 1) & ~np.isfinite(arrays[name]), "a finite number where mask is 1")


def _refuse(name: str, array: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        position = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise RequestError(f"{name}[{', '.join(map(str, position))}]", array[position], expected)


def json_array(value: Any) -> np.ndarray:
    """A JSON value as a bytes array [1], the form of `error` and of an endpoint's `reply`."""
    return bytes_array(json.dumps(value).encode())


def bytes_array(value: bytes) -> np.ndarray:
    return np.array([value], dtype=np.object_)
