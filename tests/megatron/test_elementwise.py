"""Our rotation and SwiGLU are megatron-core's own, bit for bit; our RMSNorm is torch's."""

import gc
import importlib
import inspect
import weakref
from typing import Any

import pytest
import torch

from nemo_eppo.megatron import device
from nemo_eppo.megatron.elementwise import norm_of_all, rms_norm_on_cpu, rotation, scale_all, swiglu

device.install()
ROPE: Any = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
# the function that ours has taken the place of
OWN: Any = inspect.getclosurevars(ROPE._apply_rotary_pos_emb_bshd).nonlocals["fallback"]


def with_gradient(function: Any, t: torch.Tensor, *others: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the gradient of a sum of it with weights."""
    given = t.clone().requires_grad_()
    out = function(given, *others, **settings)
    weights = torch.arange(out.numel(), dtype=torch.float32).view_as(out).sin().to(out.dtype)
    (out * weights).sum().backward()
    assert given.grad is not None
    return out.detach(), given.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "settings"),
    [
        (16, {}),
        (16, {"mscale": 1.3}),
        (16, {"rotary_interleaved": True}),
        (10, {}),
        (16, {"multi_latent_attention": True}),
    ],
)
def test_a_rotation_and_its_gradient(dtype: torch.dtype, width: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    t, angles = torch.randn(7, 2, 3, 16).to(dtype), torch.rand(7, 1, 1, width) * 50
    assert OWN.__module__ == ROPE.__name__
    function = rotation(OWN)
    for _ in range(2):  # the second time with what was kept
        made, expected = (with_gradient(each, t, angles, **settings) for each in (function, OWN))
        assert all(map(torch.equal, made, expected))


def test_angles_of_other_tensors_are_not_mixed_up_nor_kept() -> None:
    function, t = rotation(OWN), torch.randn(5, 1, 2, 8)
    for scale in (1.0, 2.0, 3.0):
        angles = torch.rand(5, 1, 1, 8) * scale
        assert torch.equal(function(t, angles), OWN(t, angles))
        gone = weakref.ref(angles)
        del angles
        gc.collect()
        assert gone() is None


def test_a_table_of_an_inference_can_be_trained_with() -> None:
    function, t, angles = rotation(OWN), torch.randn(5, 1, 2, 8), torch.rand(5, 1, 1, 8)
    with torch.inference_mode():
        function(t, angles)
    assert torch.equal(with_gradient(function, t, angles)[1], with_gradient(OWN, t, angles)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 10), (1, 7, 64)])
def test_swiglu_and_its_gradient(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As `MLP.forward` computes it where nothing is fused."""

    def unfused(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * (up + 0.0)

    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype) * 3
    made, expected = with_gradient(swiglu, x, None, False, False), with_gradient(unfused, x)
    assert all(map(torch.equal, made, expected))


@pytest.mark.parametrize("shape", [(3, 2, 10), (1, 64), (16,)])
def test_rms_norm_and_its_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    eps, grad = 0.1, torch.randn(shape, dtype=torch.float64)  # large enough to matter
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, shape[-1:]))
    made, expected = rms_norm_on_cpu(x, weight, eps), torch.nn.functional.rms_norm(x, shape[-1:], weight, eps)
    torch.testing.assert_close(made, expected)
    found, wanted = (torch.autograd.grad(out, (x, weight), grad) for out in (made, expected))
    torch.testing.assert_close(found, wanted)


def test_rms_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm_on_cpu(x, torch.ones(4), 1e-5).sum().backward()
    assert torch.equal(x, torch.zeros(2, 4))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_norm_of_all_gradients_and_their_scaling() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in ((3, 2), (7,), (1,))]
    expected = torch.cat([tensor.flatten() for tensor in tensors])
    norm, _ = norm_of_all(1, torch.zeros(1), [tensors], False)
    assert norm.shape == (1,)
    assert norm.item() == pytest.approx(expected.norm().item(), rel=1e-6)
    places = [tensor.data_ptr() for tensor in tensors]
    scale_all(1, torch.zeros(1), [tensors, tensors], 0.25)
    assert torch.equal(torch.cat([tensor.flatten() for tensor in tensors]), expected * 0.25)
    assert [tensor.data_ptr() for tensor in tensors] == places
