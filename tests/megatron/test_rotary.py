"""Our rotation is megatron-core's own, bit for bit."""

import gc
import importlib
import weakref
from typing import Any

import pytest
import torch

from nemo_eppo.megatron import device
from nemo_eppo.megatron.rotary import rotation

device.install()
ROPE: Any = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
# the function that ours has taken the place of
OWN: Any = ROPE._apply_rotary_pos_emb_bshd.__closure__[1].cell_contents


def rotated(function: Any, t: torch.Tensor, angles: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the gradient of a sum of it with weights."""
    given = t.clone().requires_grad_()
    out = function(given, angles, **settings)
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
def test_values_and_gradients(dtype: torch.dtype, width: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    t, angles = torch.randn(7, 2, 3, 16).to(dtype), torch.rand(7, 1, 1, width) * 50
    assert OWN.__module__ == ROPE.__name__
    function = rotation(OWN)
    for _ in range(2):  # the second time with what was kept
        for ours, theirs in zip(
            rotated(function, t, angles, **settings), rotated(OWN, t, angles, **settings), strict=True
        ):
            assert torch.equal(ours, theirs)


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
    assert torch.equal(rotated(function, t, angles)[1], rotated(OWN, t, angles)[1])
