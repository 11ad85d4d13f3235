"""A windowed query sees itself and the window - 1 keys before it, as plain loops compute it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_eppo.megatron import device
from nemo_eppo.megatron.attention import attend


def inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query with 4 heads; key and value with 2 groups."""
    draw = torch.Generator().manual_seed(size)
    query, key, value = (torch.randn(1, n, size, 8, generator=draw, dtype=torch.float64) for n in (4, 2, 2))
    return query, key, value


def by_loops(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
    out = torch.zeros_like(query)
    for head in range(query.size(1)):
        group = head // (query.size(1) // key.size(1))
        for i in range(query.size(2)):
            seen = slice(max(0, i + 1 - (window or i + 1)), i + 1)
            logits = key[0, group, seen] @ query[0, head, i] * 8**-0.5
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            out[0, head, i] = logits.softmax(0) @ value[0, group, seen]
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("size", "window"), [(1, 1), (9, 1), (9, 4), (9, 8), (9, 9), (9, 20), (9, None), (514, 40)])
def test_a_query_sees_its_window(size: int, window: int | None, softcap: float | None) -> None:
    given = inputs(size)
    got = attend(*given, causal=True, window=window, softcap=softcap)
    torch.testing.assert_close(got, by_loops(*given, window, softcap), rtol=0, atol=1e-12)


def test_layers_and_rows_share_one_mask_after_generation_too() -> None:
    with torch.inference_mode():
        attend(*inputs(300), causal=True, window=30)
    masks = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1] == tensor.shape[-2]:
            masks.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rows = [[tensor.requires_grad_() for tensor in inputs(size)] for size in (300, 90, 300)]
        outputs = [attend(query, key, value, causal=True, window=30) for query, key, value in rows]
    torch.stack([output.sum() for output in outputs]).sum().backward()
    assert len(masks) == 3
    assert len(set(masks)) == 1


@pytest.mark.parametrize(
    ("window", "dtype", "grouped"),
    [(4, torch.float64, False), (None, torch.float32, False), (None, torch.bfloat16, True)],
    ids=["mask", "fp32", "neither"],
)
def test_a_gpu_gets_a_kernel_that_keeps_no_logits(
    window: int | None, dtype: torch.dtype, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's kernel for masks and fp32 takes as many heads of keys as of queries; its next choice keeps all logits."""
    rows = [tensor.to(dtype).requires_grad_() for tensor in inputs(9)]
    expected = attend(*rows, causal=True, window=window)
    gradients = torch.autograd.grad(expected.sum(), rows)
    calls = []
    fused, capability = F.scaled_dot_product_attention, [9, 0]

    def spy(query: Tensor, key: Tensor, *others: Any, **settings: Any) -> Tensor:
        calls.append((key.size(1), settings["enable_gqa"], torch.backends.cuda.cudnn_sdp_enabled()))
        return fused(query, key, *others, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: tuple(capability))
    got = attend(*rows, causal=True, window=window)
    capability[0] = 10
    attend(*rows, causal=True, window=window)
    heads = (2, True) if grouped else (4, False)
    assert calls == [(*heads, window is None), (*heads, False)], "cuDNN's errs with masks, and on a B200"
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), rows), gradients)
