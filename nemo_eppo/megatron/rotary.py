"""Rotary positions in fewer passes over memory than megatron-core's own unfused rotation takes: it copies each tensor
twice more to put halves together. Values and gradients are the same to the last bit."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.weak import WeakIdKeyDictionary

_Key = tuple[torch.dtype, float]


class Rotation(Protocol):
    """Rotates t [s, ..., D] by angles [s, 1, 1, R]: the signature of megatron-core's `_apply_rotary_pos_emb_bshd`."""

    def __call__(
        self,
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Tensor: ...


def rotation(others: Rotation) -> Rotation:
    """Return a rotation of whole heads whose halves are pairs, as in all model families here; `others` does the rest.

    Cosines and sines are computed once for each tensor of angles, not in each layer for queries and for keys.
    """
    known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # angles -> {(dtype, scale): (cosines, sines)}

    def rotate(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        if rotary_interleaved or multi_latent_attention or freqs.size(-1) != t.size(-1):
            return others(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        tables: dict[_Key, tuple[Tensor, Tensor]] = known.setdefault(freqs, {})
        if (t.dtype, mscale) not in tables:
            with torch.inference_mode(False), torch.no_grad():  # they are kept for passes that have gradients
                cos, sin = ((table * mscale).to(t.dtype) for table in (freqs.cos(), freqs.sin()))
                first, second = sin.chunk(2, -1)
                tables[t.dtype, mscale] = cos, torch.cat([-first, second], -1)
        rotated: Tensor = _Rotate.apply(t, *tables[t.dtype, mscale])
        return rotated

    return rotate


class _Rotate(torch.autograd.Function):
    """t cos + swapped(t) sin, where the halves of the last dimension swap places and sines carry the sign."""

    @staticmethod
    def forward(ctx: FunctionCtx, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (t * cos).add_(_swapped(t).mul_(sin))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grads[0] * cos).add_(_swapped(grads[0] * sin)), None, None


def _swapped(t: Tensor) -> Tensor:
    return t.roll(t.size(-1) // 2, -1)
