"""The weights of a Megatron decoder's layers, as `Decoder` computes with them."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from nemo_eppo.megatron.attention import layer_window
from nemo_eppo.megatron.lora import SUFFIX, Adapter
from nemo_eppo.megatron.specs import FUSED_NORMS
from nemo_eppo.settings.energy import EnergyProbeConfig


class Linear(NamedTuple):
    """A linear map's weight [out, in], with its bias [out] and its adapter where it has them."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out.add_(self.adapter.local(x)) if self.adapter is not None and self.adapter.enabled else out


class Layer(NamedTuple):
    """This rank's weights of one decoder layer, as Megatron lays them out."""

    attention_norm: Tensor
    """Weight [H] of the norm before attention."""
    qkv: Linear
    """Weight [G * (R + 2) * D, H]: for each of G key/value groups, R query heads, then key, then value."""
    q_norm: Tensor | None
    """Weight [D] of the norm on queries; None without one, as is `k_norm`."""
    k_norm: Tensor | None
    """Weight [D] of the norm on keys."""
    projection: Linear
    """Weight [H, G * R * D]."""
    mlp_norm: Tensor
    """Weight [H] of the norm before the MLP."""
    gate_up: Linear
    """Weight [2 * F, H]: gate rows, then up rows."""
    down: Linear
    """Weight [H, F]."""
    after_attention: Tensor | None
    """Weight [H] of the norm on attention's output; None without one."""
    after_mlp: Tensor | None
    """Weight [H] of the norm on the MLP's output; None without one."""
    window: int | None
    """How many tokens, itself included, a token sees; None for all up to itself."""
    energies: list[slice]
    """Columns of the layer's energies; empty if none are read."""


def layer_weights(layer: Any, energy: EnergyProbeConfig | None) -> Layer:
    """Return the weights of a Megatron layer, and the columns of its energies."""
    weights = {FUSED_NORMS.get(name, name): parameter for name, parameter in layer.named_parameters()}
    modules = dict(layer.named_modules())

    def linear(name: str) -> Linear:
        return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"), modules.get(name + SUFFIX))

    return Layer(
        attention_norm=weights["input_layernorm.weight"],
        qkv=linear("self_attention.linear_qkv"),
        q_norm=weights.get("self_attention.q_layernorm.weight"),
        k_norm=weights.get("self_attention.k_layernorm.weight"),
        projection=linear("self_attention.linear_proj"),
        mlp_norm=weights["pre_mlp_layernorm.weight"],
        gate_up=linear("mlp.linear_fc1"),
        down=linear("mlp.linear_fc2"),
        after_attention=weights.get("self_attn_bda.norm.weight"),
        after_mlp=weights.get("mlp_bda.norm.weight"),
        window=layer_window(layer.config, layer.layer_number),
        energies=energy.columns(layer.layer_number - 1, layer.config.num_layers) if energy else [],
    )


def rotate(heads: Tensor, table: Tensor) -> None:
    """Rotate queries and keys [..., D] in place by a table [2, ..., D] of cosines and signed sines.

    With a table in the heads' dtype, every operation rounds, as in Megatron; with one of higher precision, only the
    result does, as in TransformerEngine's kernel.
    """
    halves_swapped = heads.roll(heads.size(-1) // 2, -1)
    if table.dtype == heads.dtype:
        heads.mul_(table[0]).add_(halves_swapped.mul_(table[1]))
    else:
        heads.copy_(heads * table[0] + halves_swapped * table[1])
