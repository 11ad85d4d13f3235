"""Attention in plain torch: soft-capped or not, over all tokens before or a sliding window of them."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention of query [b, heads, l, D] to key and value [b, groups, s, D] -> [b, heads, l, D].

    Args:
        visible: bool, True where a query sees a key, or fp32 to be added to the scores; broadcasts to [b, heads, l, s].
        causal: instead: query i sees keys up to i.
        scale: of the scores; None for D ** -0.5.
        softcap: c of c * tanh(score / c), before anything is hidden (Gemma 2, arXiv 2408.00118, section 2); None for
            torch's fused attention, which has none. With it all scores are held, in fp32.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            visible,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
        )
    grouped = query.unflatten(1, (key.size(1), -1))  # [b, groups, heads of a group, l, D]
    scores = (grouped @ key.unsqueeze(2).mT).to(torch.promote_types(query.dtype, torch.float32)).flatten(1, 2)
    scores = softcap * torch.tanh(scores * ((query.size(-1) ** -0.5 if scale is None else scale) / softcap))
    if causal:
        visible = window_mask(query.size(2), None, query.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else scores + visible
    weights = scores.softmax(-1).to(value.dtype).unflatten(1, (key.size(1), -1))
    return (weights @ value.unsqueeze(2)).flatten(1, 2)


def window_mask(size: int, window: int | None, device: torch.device) -> Tensor:
    """bool [size, size], True where a token (row) sees another: itself and those before, up to `window` of them."""
    visible = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a token sees in a layer, counted from 1; None for all before it."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return config.window_size[0] + 1 if windowed else None


class CoreAttention(nn.Module):
    """Megatron's core attention by `attend`; in a mask, True means hidden."""

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
        if attention_bias is not None:
            raise NotImplementedError("this core attention takes no attention bias")
        if packed_seq_params is not None:
            sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
            parts = [t.unsqueeze(1).split(sizes) for t in (query, key, value)]
            return torch.cat([self._attend(q, k, v, None) for q, k, v in zip(*parts, strict=True)]).squeeze(1)
        return self._attend(query, key, value, attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        visible = None if attention_mask is None else ~attention_mask
        size = query.size(0)
        if self.window is not None and self.window < size:
            windowed = window_mask(size, self.window, query.device)
            visible = windowed if visible is None else visible & windowed
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = attend(q, k, v, visible, causal=visible is None, scale=self.scale, softcap=self.softcap)
        return out.permute(2, 0, 1, 3).reshape(size, query.size(1), -1)
