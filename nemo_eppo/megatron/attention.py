"""Attention in plain torch, with an optional sliding window and an optional cap on its logits."""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo_eppo.megatron import device

ALL_BUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Torch's attention kernels without cuDNN's, which plans anew for every shape (42 ms against 0.25 ms on a GPU, pytorch
PR 191576) and in torch 2.11 gives wrong numbers: with a mask, gradients on an H100 may be NaN (pytorch issue 196678);
without gradients, it fails silently on a B200 with fewer than 8 groups (193893)."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention of query [b, heads, l, D] to key and value [b, groups, s, D] -> [b, heads, l, D].

    Args:
        visible: broadcasts to [b, heads, l, s]; bool, True where a query sees a key, or added to the logits.
        causal: replaces `visible` where l = s: query i sees keys up to i.
        window: with `causal`, query i sees only this many keys, up to i; None for all.
        scale: factor of the logits; None for D ** -0.5.
        softcap: c of c * tanh(logit / c), applied before the mask (Gemma 2, arXiv 2408.00118, section 2); it
            keeps all logits in memory, in fp32. None uses torch's fused attention.
    """
    size = query.size(2)
    if causal and (softcap is not None or (window is not None and window < size)):
        rounded = -(-size // 512) * 512
        visible = _causal_mask(rounded, window or rounded, query.dtype, query.device)[:size, :size]
        causal = False
    if softcap is None:
        heads, groups = query.size(1), key.size(1)
        if device.on_gpu() and heads != groups and (visible is not None or query.dtype == torch.float32):
            # torch's fused kernel for masks and fp32 wants as many key heads as query heads; others keep all logits
            key, value = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
        gqa = heads != key.size(1)
        with sdpa_kernel(ALL_BUT_CUDNN) if device.on_gpu() and _errs_in_cudnn(visible) else nullcontext():
            return F.scaled_dot_product_attention(
                query, key, value, visible, is_causal=causal, scale=scale, enable_gqa=gqa
            )
    grouped = query.unflatten(1, (key.size(1), -1))  # [b, groups, heads of a group, l, D]
    logits = (grouped @ key.unsqueeze(2).mT).to(torch.promote_types(query.dtype, torch.float32)).flatten(1, 2)
    logits = softcap * torch.tanh(logits * ((query.size(-1) ** -0.5 if scale is None else scale) / softcap))
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else logits + visible
    weights = logits.softmax(-1).to(value.dtype).unflatten(1, (key.size(1), -1))
    return (weights @ value.unsqueeze(2)).flatten(1, 2)


def _errs_in_cudnn(visible: Tensor | None) -> bool:
    return visible is not None or torch.cuda.get_device_capability() >= (10, 0)


@lru_cache(maxsize=4)
def _causal_mask(size: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [size, size]: 0 where a query sees a key, up to itself and in its window, else -inf.

    Torch keeps it for the backward pass of each layer, so all layers and shorter rows share one.
    """
    with torch.inference_mode(False):  # training may use it after generation
        seen = torch.ones(size, size, dtype=torch.bool, device=device).tril_().triu_(1 - window)
        return torch.zeros(size, size, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Return how many tokens, itself included, a token sees in a layer (counted from 1); None for all up to itself."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] + 1 if windowed else None


class CoreAttention(nn.Module):
    """Megatron's core attention, computed with `attend`: a token sees itself and the tokens before it."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.softcap = softmax_scale, softcap
        self.window = layer_window(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, heads, width], key and value [s, b, groups, width] -> [s, b, heads * width].

        Packed rows come as [tokens, heads, width], and leave as [tokens, heads * width].
        """
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("this core attention takes neither a mask nor a bias")
        if packed_seq_params is not None:
            sizes = packed_seq_params.cu_seqlens_q.diff().tolist()  # in the host's memory: no wait for the device
            parts = [t.unsqueeze(1).split(sizes) for t in (query, key, value)]
            return torch.cat([self._attend(q, k, v) for q, k, v in zip(*parts, strict=True)]).squeeze(1)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        size = len(query)
        if extra := -size % device.tokens_multiple():  # a row of a pack; no token sees the padding after it
            q, k, v = (F.pad(t, (0, 0, 0, extra)) for t in (q, k, v))
        out = attend(q, k, v, causal=True, window=self.window, scale=self.scale, softcap=self.softcap)
        return out[:, :, :size].permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
