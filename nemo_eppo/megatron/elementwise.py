"""Rotary positions, SwiGLU, RMSNorm and gradient norms in fewer passes and calls than those they replace.

CPUs use all of them, GPUs without TransformerEngine and Apex the rotation and the gradient norm. megatron-core's
unfused rotation and SwiGLU copy whole tensors to join halves; values and gradients here are the same to the last bit.
torch's RMSNorm takes some twenty operations on a CPU, forward and backward, this one nine.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
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


def rotation(fallback: Rotation) -> Rotation:
    """Return a rotation that pairs the halves of a whole head, as all model families here do; else it calls `fallback`.

    Cosines and sines are computed once for each tensor of angles, not in each layer for queries and for keys.
    """
    tables_of: WeakIdKeyDictionary = WeakIdKeyDictionary()  # angles -> {(dtype, scale): (cosines, sines)}

    def rotate(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        if rotary_interleaved or multi_latent_attention or freqs.size(-1) != t.size(-1):
            return fallback(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        tables: dict[_Key, tuple[Tensor, Tensor]] = tables_of.setdefault(freqs, {})
        if (t.dtype, mscale) not in tables:
            with torch.inference_mode(False), torch.no_grad():  # kept for passes with gradients, too
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
        (first, second), (sin_first, sin_second) = t.chunk(2, -1), sin.chunk(2, -1)
        return (t * cos).add_(_side_by_side(t, (second, sin_first), (first, sin_second)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (cos, sin), [grad] = ctx.saved_tensors, grads
        (first, second), (sin_first, sin_second) = grad.chunk(2, -1), sin.chunk(2, -1)
        return (grad * cos).add_(_side_by_side(grad, (second, sin_second), (first, sin_first))), None, None


def _side_by_side(like: Tensor, *factors: tuple[Tensor, Tensor]) -> Tensor:
    """Return the products of two pairs as the halves of one tensor."""
    out = torch.empty_like(like)
    for half, (one, other) in zip(out.chunk(2, -1), factors, strict=True):
        torch.mul(one, other, out=half)
    return out


def swiglu(x: Tensor, bias: None, *_: bool) -> Tensor:
    """silu(gate) up of x [s, b, 2 F], whose halves are gate and up: megatron-core's `bias_swiglu_impl` without bias."""
    out: Tensor = _SwiGLU.apply(x)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x, activated), [grad] = ctx.saved_tensors, grads
        grad_x = torch.empty_like(x)
        (gate, up), (grad_gate, grad_up) = x.chunk(2, -1), grad_x.chunk(2, -1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x


def rms_norm_on_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x [..., H] with weight [H] of its precision."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight, scale), [grad] = ctx.saved_tensors, grads
        normed = x * scale
        product = grad * normed
        radial = (product @ weight).unsqueeze(-1)  # the gradient along x, whose length the norm removes
        grad_x = (grad * weight).addcmul_(normed, radial, value=-1 / x.size(-1)).mul_(scale)
        return grad_x, product.reshape(-1, weight.numel()).sum(0), None


def norm_of_all(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], of_each: bool) -> tuple[Tensor, None]:
    """Return the L2 norm [1] of all tensors in `lists[0]`, with the signature of Apex's `multi_tensor_l2norm`."""
    return torch.nn.utils.get_total_norm(lists[0]).reshape(1), None


def scale_all(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Scale the tensors in `lists[0]` in place: Apex's `multi_tensor_scale` for equal source and target lists."""
    torch._foreach_mul_(lists[0], factor)
