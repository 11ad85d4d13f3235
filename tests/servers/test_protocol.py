"""What a server accepts: every bad request is refused with the field, its value and what was expected."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.protocol import Array, Arrays, Endpoint, Limits, RequestError, StepRule, check_arrays

LIMITS = Limits(vocab_size=50, max_sequence_length=12, max_batch_size=6)
Request = dict[str, np.ndarray]


def train_request(rng: np.random.Generator, batch: int = 4, size: int = 9) -> Request:
    lengths = rng.integers(2, size + 1, batch, dtype=np.int32)
    lengths[0] = size
    action = np.arange(1, size)
    mask = ((action >= lengths[:, None] // 2) & (action < lengths[:, None])).astype(np.uint8)
    noise = rng.normal(size=(2, batch, size - 1)).astype(np.float32)
    return {
        "tokens": rng.integers(0, LIMITS.vocab_size, (batch, size), dtype=np.int32),
        "lengths": lengths,
        "returns": np.where(mask == 1, noise[0], np.float32(np.nan)),
        "values": np.where(mask == 1, noise[1], np.float32(np.inf)),
        "mask": mask,
        "step": np.array([1]),
    }


def reward_request(rng: np.random.Generator) -> Request:
    request = train_request(rng)
    lengths = request["lengths"]
    return {"tokens": request["tokens"], "lengths": lengths, "prompt_lengths": np.maximum(lengths // 2, 1)}


def put(name: str, position: tuple[int, ...], value: float) -> Callable[[Request], None]:
    def change(request: Request) -> None:
        request[name] = request[name].copy()
        request[name][position] = value

    return change


def replace(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Request], None]:
    def change(request: Request) -> None:
        request[name] = function(request[name])

    return change


def all_rows(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Request], None]:
    def change(request: Request) -> None:
        for name in request.keys() - {"step"}:
            request[name] = function(request[name])

    return change


def widen(request: Request) -> None:
    for name in ("tokens", "returns", "values", "mask"):
        request[name] = np.pad(request[name], ((0, 0), (0, 5)))


def lengthen_mask(request: Request) -> None:
    request["lengths"][1] = 5
    request["mask"][1] = 0
    request["mask"][1, 4] = 1  # action 4 predicts token 5, which is padding


# endpoint, what is wrong, and the field, value and expectation that the error has to name
BAD = {
    "token_too_large": ("critic_train", put("tokens", (2, 3), 50), "tokens[2, 3]", "50", "[0, 50)"),
    "token_negative": ("critic_train", put("tokens", (0, 8), -1), "tokens[0, 8]", "-1", "[0, 50)"),
    "length_of_one": ("critic_train", put("lengths", (1,), 1), "lengths[1]", "1", "[2, 9]"),
    "length_beyond_array": ("critic_train", put("lengths", (3,), 10), "lengths[3]", "10", "[2, 9]"),
    "nan_return": ("critic_train", put("returns", (0, 7), np.nan), "returns[0, 7]", "nan", "finite"),
    "infinite_value": ("critic_train", put("values", (0, 7), np.inf), "values[0, 7]", "inf", "finite"),
    "mask_of_two": ("critic_train", put("mask", (0, 7), 2), "mask[0, 7]", "2", "0 or 1"),
    "mask_on_padding": ("critic_train", lengthen_mask, "mask[1, 4]", "1", "0 on padding"),
    "mask_all_zero": ("critic_train", replace("mask", np.zeros_like), "mask", "all 0", "at least one"),
    "negative_step": ("critic_train", put("step", (0,), -1), "step[0]", "-1", ">= 0"),
    "two_steps": ("critic_train", replace("step", lambda x: np.repeat(x, 2)), "step", "[2]", "int64 [1]"),
    "empty_batch": ("critic_train", all_rows(lambda x: x[:0]), "tokens", "[0, 9]", "nothing empty"),
    "large_batch": ("critic_train", all_rows(lambda x: np.repeat(x, 2, 0)), "tokens", "[8, 9]", "at most 6"),
    "long_sequences": ("critic_train", widen, "tokens", "[4, 14]", "at most 12"),
    "rank": ("critic_train", replace("tokens", lambda x: x[0]), "tokens", "[9]", "int32 [B, S]"),
    "dtype": ("critic_train", replace("tokens", lambda x: x.astype(np.int64)), "tokens", "int64", "int32 [B, S]"),
    "rows_differ": ("critic_train", replace("returns", lambda x: x[:3]), "returns", "[3, 8]", "B = 4"),
    "actions_like_tokens": (
        "critic_train",
        replace("values", lambda x: np.pad(x, ((0, 0), (0, 1)))),
        "values",
        "[4, 9]",
        "S = 9",
    ),
    "missing": ("critic_train", lambda request: request.pop("mask"), "mask", "missing", "uint8 [B, T]"),
    "unknown": ("critic_train", lambda request: request.update(weight=request["mask"]), "weight", "an array", "none"),
    "prompt_is_everything": ("reward_infer", put("prompt_lengths", (0,), 9), "prompt_lengths[0]", "9", "less than"),
    "no_prompt": ("reward_infer", put("prompt_lengths", (2,), 0), "prompt_lengths[2]", "0", "at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_refused_with_field_value_and_expectation(name: str) -> None:
    endpoint, change, field, value, expected = BAD[name]
    rng = np.random.default_rng(0)
    request = train_request(rng) if endpoint == "critic_train" else reward_request(rng)
    ENDPOINTS[endpoint].validate(request, LIMITS)
    change(request)
    with pytest.raises(RequestError) as caught:
        ENDPOINTS[endpoint].validate(request, LIMITS)
    error = caught.value
    assert error.field == field
    assert value in error.value
    assert expected in error.expected
    assert all(part in str(error) for part in (error.field, error.value, error.expected))


def test_random_requests_are_accepted_and_a_planted_fault_is_named() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        batch, size = int(rng.integers(1, 7)), int(rng.integers(2, 13))
        request = train_request(rng, batch, size)
        if not request["mask"].any():
            continue
        ENDPOINTS["critic_train"].validate(request, LIMITS)

        row, action = (int(i) for i in rng.choice(np.argwhere(request["mask"])))
        fault, value, position = [
            ("tokens", rng.choice([-1, 50, 2**31 - 1, -(2**31)]), (row, action)),
            ("lengths", rng.choice([-5, 0, 1, size + 1]), (row,)),
            ("returns", rng.choice([np.nan, np.inf, -np.inf]), (row, action)),
            ("values", rng.choice([np.nan, np.inf, -np.inf]), (row, action)),
            ("mask", rng.integers(2, 256), (row, action)),
        ][rng.integers(5)]
        put(fault, position, value)(request)
        with pytest.raises(RequestError) as caught:
            ENDPOINTS["critic_train"].validate(request, LIMITS)
        assert caught.value.field == f"{fault}[{', '.join(map(str, position))}]"


def test_optional_output_may_be_left_out() -> None:
    spec = ENDPOINTS["reward_infer"].outputs
    rewards: Arrays = {"rewards": np.zeros((3, 2), np.float32)}
    assert check_arrays(spec, rewards) == {"B": 3, "K": 2}
    with pytest.raises(RequestError, match="rewards = missing"):
        check_arrays(spec, {"latents": np.zeros((3, 2), np.float32)})


def test_a_request_arrives_as_tensors_of_the_declared_dtype_in_memory_of_its_own() -> None:
    endpoint, request = ENDPOINTS["critic_train"], train_request(np.random.default_rng(2))
    request["tokens"] = np.asfortranarray(request["tokens"])
    tensors = endpoint.decode(request)
    integers, floats = dict.fromkeys(("tokens", "lengths", "step"), torch.int64), ("returns", "values")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        **integers,
        **dict.fromkeys(floats, torch.float32),
        "mask": torch.bool,
    }
    for name, array in request.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert tensors[name].is_contiguous()
        assert not np.shares_memory(tensors[name].numpy(), array)
        sent = endpoint.encode(tensors)[name]
        assert sent.dtype == array.dtype
        np.testing.assert_array_equal(sent, array)


def test_bfloat16_and_other_layouts_are_sent_as_declared() -> None:
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T
    sent = ENDPOINTS["critic_infer"].answer({"values": values})["values"]
    assert (sent.dtype, sent.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(sent, [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"rewards": torch.zeros(3)}, r"rewards = float32 of shape \[3\], expected float32 \[B, K\]"),
        ({"rewards": torch.zeros(3, 1).long()}, r"rewards = torch\.int64, expected float"),
        ({"rewards": torch.zeros(3, 1), "latents": torch.zeros(2, 4)}, "latents = shape"),
        ({"rewards": torch.zeros(3, 1), "scores": torch.zeros(3, 1)}, "scores = an array, expected none of this name"),
        ({}, "rewards = missing"),
    ],
)
def test_an_answer_that_does_not_fit_the_table_is_the_services_fault(
    result: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(TypeError, match=f"the service's own output does not fit: {message}"):
        ENDPOINTS["reward_infer"].answer(result)


def test_any_table_is_checked_by_its_own_rules() -> None:
    def even(arrays: Arrays, limits: Limits) -> None:
        if len(arrays["x"]) % 2:
            raise RequestError("x", len(arrays["x"]), "an even number of rows")

    endpoint = Endpoint({"x": Array(np.float32, ("B", "W"))}, reply="sum", step=StepRule.NEXT, check=even)
    step = np.array([3])
    endpoint.validate({"x": np.zeros((2, 5), np.float32), "step": step}, LIMITS)
    for rows, wrong, message in (
        (3, step, "x = 3, expected an even number"),
        (2, -step, r"step\[0\] = -3, expected"),
    ):
        with pytest.raises(RequestError, match=message):
            endpoint.validate({"x": np.zeros((rows, 5), np.float32), "step": wrong}, LIMITS)
    with pytest.raises(RequestError, match="step = missing"):
        endpoint.validate({"x": np.zeros((2, 5), np.float32)}, LIMITS)
