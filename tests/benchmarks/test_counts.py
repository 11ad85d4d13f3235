"""What benchmarks count beside times, in closed form."""

import memory
import pytest
import scaling
import torch
from torch import Tensor


def test_activations_are_what_a_backward_pass_needs_of_half_the_rows_once() -> None:
    weight = torch.randn(8, 16, requires_grad=True)

    def work(runner: None, rows: dict[str, Tensor]) -> None:
        product = rows["inputs"] @ weight  # keeps its input and the weight
        (product.exp() * 2).sum().backward()  # exp keeps its output

    rows = {"inputs": torch.randn(64, 8, requires_grad=True)}
    found = memory.activations(None, work, rows, [weight])  # type: ignore[arg-type]
    assert found * memory.MIB == 4 * (64 * 8 + 32 * 16)  # the whole input's storage, of which half is a view


def test_expected_exponents_are_those_of_the_work() -> None:
    found = {
        dimension: scaling.slope(sizes, [scaling.flops(**scaling.BASE | {dimension: size})["update"] for size in sizes])
        for dimension, sizes in scaling.SIZES.items()
    }
    assert found["batch"] == pytest.approx(1)
    assert found["layers"] < 1 < found["sequence"] < 2
    long = (2**17, 2**18)  # attention is nearly all
    assert scaling.slope(long, [scaling.flops(**scaling.BASE | {"sequence": size})["update"] for size in long]) > 1.9


def test_only_what_is_above_the_expected_exponent_is_named() -> None:
    square = [1.0, 4.0, 16.0]
    assert scaling._row("update", "sequence", (1, 2, 4), square, square)["verdict"] == ""
    assert scaling._row("update", "sequence", (1, 2, 4), square, (1.0, 2.0, 4.0))["verdict"] == "more than 0.1 above"
    last = scaling._row("update", "sequence", (1, 2, 4), (4.0, 4.0, 9.0), (1.0, 2.0, 4.0))  # above in the end only
    assert last["verdict"] == "more than 0.1 above"
