"""Scalar heads on a decoder: values of a critic, scores of a reward model."""

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """A linear map from the final hidden states to `outputs` numbers per token, always in fp32.

    Under sequence parallelism each rank scores its own part of the sequence; only scores are gathered, and the weight's
    partial gradients are summed by Megatron like those of a norm.
    """

    def __init__(self, config: TransformerConfig, outputs: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, config.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)
        self.sequence_parallel = config.sequence_parallel
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [s, b, H], or its sequence-parallel part -> scores [b, s, outputs] fp32."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scores = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        if self.sequence_parallel:
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False)
        return scores.transpose(0, 1).contiguous()
