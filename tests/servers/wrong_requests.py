"""Requests that a server applies, and what can be wrong with one."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from tiny_server import VOCAB

from nemo_eppo.servers.transport import _encode

TOKENS, LENGTHS = torch.arange(8).reshape(2, 4) % (VOCAB - 4), torch.full((2,), 4)
ENDPOINTS = ("critic_infer", "critic_train", "reward_infer")


def right(endpoint: str) -> Any:
    """A request that would be applied."""
    per_action = torch.zeros(2, 3)
    arrays = {
        "critic_infer": {"tokens": TOKENS, "lengths": LENGTHS},
        "critic_train": {
            "tokens": TOKENS, "lengths": LENGTHS, "returns": per_action, "values": per_action,
            "mask": torch.ones(2, 3, dtype=torch.uint8), "step": torch.tensor([1]),
        },
        "reward_infer": {"tokens": TOKENS, "prompt_lengths": LENGTHS - 2, "lengths": LENGTHS},
    }[endpoint]  # fmt: skip
    sent = {n: a.to(torch.int32) if a.dtype == torch.int64 and n != "step" else a for n, a in arrays.items()}
    return _encode(endpoint, {name: array.numpy() for name, array in sent.items()})


def of(request: Any, random: Random) -> int:
    return random.randrange(len(request.inputs))


def leave_out(request: Any, random: Random) -> None:
    index = of(request, random)
    del request.inputs[index], request.raw_input_contents[index]


def rename(request: Any, random: Random) -> None:
    request.inputs[of(request, random)].name = "".join(chr(random.randrange(32, 500)) for _ in range(8))


def other_type(request: Any, random: Random) -> None:
    request.inputs[of(request, random)].datatype = random.choice(["BYTES", "FP64", "BOOL", "INT8", "UINT64", "X", ""])


def other_shape(request: Any, random: Random) -> None:
    shape = [random.choice([-1, 0, 1, 3, 7, 2**31, 2**62]) for _ in range(random.randrange(4))]
    field = request.inputs[of(request, random)]
    field.shape[:] = shape if shape != list(field.shape) else [5]


def cut(request: Any, random: Random) -> None:
    index = of(request, random)
    request.raw_input_contents[index] = request.raw_input_contents[index][: random.randrange(3)]


def lengthen(request: Any, random: Random) -> None:
    request.raw_input_contents[of(request, random)] += random.randbytes(random.randrange(1, 100))


def wrong_tokens(request: Any, random: Random) -> None:
    wrong = torch.tensor([random.choice([-1, VOCAB, 2**31 - 1, -(2**31)])] * 8, dtype=torch.int32)
    request.raw_input_contents[0] = wrong.numpy().tobytes()


def endless_lengths(request: Any, random: Random) -> None:
    index = [field.name for field in request.inputs].index("lengths")
    wrong = torch.tensor([random.choice([0, 1, 5, -7, 2**31 - 1])] * 2, dtype=torch.int32)
    request.raw_input_contents[index] = wrong.numpy().tobytes()


def other_endpoint(request: Any, random: Random) -> None:
    request.model_name = random.choice(["", "x" * 5000, "../critic_infer", "Critic_infer"])


def other_version(request: Any, random: Random) -> None:
    request.model_version = str(random.randrange(2, 10**9))


def one_more(request: Any, random: Random) -> None:
    request.inputs.add(name="more", shape=[1], datatype="INT32")
    request.raw_input_contents.append(random.randbytes(4))


FAULTS: list[Callable[[Any, Random], None]] = [
    leave_out, rename, other_type, other_shape, cut, lengthen, wrong_tokens, endless_lengths, other_endpoint,
    other_version, one_more,
]  # fmt: skip
