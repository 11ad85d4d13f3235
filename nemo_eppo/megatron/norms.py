"""RMSNorm of all model families, before a projection and after one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_eppo.megatron.elementwise import rms_norm_on_cpu


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """RMSNorm over the last dimension of x [..., H] with weight [H]; `plus_one` scales by 1 + weight in fp32."""
    if x.is_cpu and x.dtype.itemsize >= 4:  # torch's own computes bf16 in fp32, too
        return rms_norm_on_cpu(x, 1 + weight if plus_one else weight, eps)
    if not plus_one:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, 1 + weight.to(wide), eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over the sequence-parallel ranks (megatron-core's own refuses that)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.plus_one = config.layernorm_zero_centered_gamma
        if self.plus_one:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps, self.plus_one)


class NormAndAdd(nn.Module):
    """Replaces Megatron's bias-dropout-add: norms a module's output, then adds it to the residual stream (Gemma 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return a function of ([s, b, H], None), the residual stream [s, b, H] and a dropout probability."""
        add = get_bias_dropout_add(training, fused)
        return lambda output, residual, dropout: add((self.norm(output[0]), None), residual, dropout)
