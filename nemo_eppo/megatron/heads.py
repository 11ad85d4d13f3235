"""Heads on a decoder's final hidden states: values of a critic, scores of a reward model, latents of responses.

All are computed in fp32. Under sequence parallelism each rank computes its own part of the sequence; only the results
are gathered, and Megatron sums the weights' partial gradients as it does for norms.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_eppo.algorithms.sampling import counter_uniform

ScalarHeads = Literal["scalar", "odin", "inform"]


class _TokenHead(nn.Module):
    """Base of all heads, with fp32 weights that are all marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
            if len(shape) > 1:
                nn.init.normal_(parameter, std=shape[1] ** -0.5)
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self.sequence_parallel = config.sequence_parallel
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()

    def forward(self, hidden: Tensor, seeds: Tensor | None = None) -> Tensor:
        """hidden [s, b, H], or its sequence-parallel part -> [b, s, outputs] fp32.

        Args:
            seeds: int64 [b, s], a row's seed at each of its tokens, for a head that draws random numbers in training;
                None draws none.
        """
        results = self.per_token(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), seeds)
        if self.sequence_parallel:
            results = gather_from_sequence_parallel_region(results, tensor_parallel_output_grad=False)
        return results.transpose(0, 1).contiguous()

    def per_token(self, hidden: Tensor, seeds: Tensor | None) -> Tensor:
        """[s, b, H] -> [s, b, outputs]."""
        raise NotImplementedError


class ScalarHead(_TokenHead):
    """A linear map to one number per token."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, weight=(1, config.hidden_size), bias=(1,))

    def per_token(self, hidden: Tensor, seeds: Tensor | None) -> Tensor:
        return F.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))


class OdinHead(_TokenHead):
    """ODIN's two heads, whose rows have unit length: [quality, length, cosine of the two rows] per token."""

    rows: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, rows=(2, config.hidden_size))

    def per_token(self, hidden: Tensor, seeds: Tensor | None) -> Tensor:
        rows = F.normalize(self.rows.to(hidden.dtype), dim=1)
        cosine = (rows[0] * rows[1]).sum().expand(*hidden.shape[:2], 1)
        return torch.cat([F.linear(hidden, rows), cosine], dim=-1)


class InformHead(_TokenHead):
    """InfoRM's bottleneck: a latent's score and distribution, [score, mean (d), logvar (d)] per token.

    The latent is the mean or, with seeds, a sample `mean + exp(logvar / 2) * eps`. The noise eps depends only on a
    row's seed, not on the layout, the micro-batch or the padding.
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor

    def __init__(self, config: TransformerConfig, latent_size: int) -> None:
        shapes = {"encoder": (2 * latent_size, config.hidden_size), "decoder": (1, latent_size), "bias": (1,)}
        super().__init__(config, **shapes)

    def per_token(self, hidden: Tensor, seeds: Tensor | None) -> Tensor:
        mean, logvar = F.linear(hidden, self.encoder.to(hidden.dtype)).chunk(2, dim=-1)
        latent = mean
        if seeds is not None:
            size, first = len(hidden), len(hidden) * self.tensor_rank if self.sequence_parallel else 0
            own = seeds.T[first : first + size].unsqueeze(-1)
            uniforms = counter_uniform(own, torch.arange(mean.shape[-1], device=seeds.device))
            latent = mean + (logvar / 2).exp() * torch.special.ndtri(uniforms).to(mean.dtype)
        score = F.linear(latent, self.decoder.to(hidden.dtype), self.bias.to(hidden.dtype))
        return torch.cat([score, mean, logvar], dim=-1)


def build_head(kind: ScalarHeads, config: TransformerConfig, latent_size: int) -> _TokenHead:
    """Build a head with fresh weights; `latent_size` is d of the head "inform"."""
    if kind == "odin":
        return OdinHead(config)
    return InformHead(config, latent_size) if kind == "inform" else ScalarHead(config)
