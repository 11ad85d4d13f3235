"""The energies of `megatron.energy`, read while decoding: the same numbers, without another forward pass."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eppo.settings.energy import EnergyProbeConfig


class MLPTensors(NamedTuple):
    """What passes through a layer's MLP of F channels, which are split over tensor-parallel ranks."""

    normed: Tensor
    """Its input [b, s, H], after the norm."""
    gate: Tensor
    """[b, s, F / tp]."""
    up: Tensor
    """[b, s, F / tp]."""
    activated: Tensor
    """Input [b, s, F / tp] of the down projection."""
    out: Tensor
    """Its output [b, s, H], before a norm on it."""


class EnergyReader:
    """Reads the energies of single layers.

    Args:
        tensor_ranks: the ranks over which the MLP's channels are split.
    """

    def __init__(self, config: EnergyProbeConfig, num_layers: int, tensor_ranks: dist.ProcessGroup) -> None:
        self._config, self._ranks = config, tensor_ranks
        self._layers = config.layer_indices(num_layers)

    def columns(self, layer: int) -> list[slice]:
        """Where the energies of a layer, counted from 0, stand among the E of a token; empty if none are wanted."""
        size = self._config.energies_per_token() // len(self._layers)
        return [slice(n * size, (n + 1) * size) for n, wanted in enumerate(self._layers) if wanted == layer]

    def l1(self, x: Tensor) -> Tensor:
        """Return the L1 norms [b, s, 1], fp32, of x [b, s, width], by the settings divided by the width."""
        norms = x.abs().sum(-1, keepdim=True, dtype=torch.float32)
        return norms / x.size(-1) if self._config.norm else norms

    def read(self, entered: Tensor, mlp: MLPTensors, left: Tensor) -> Tensor:
        """Return a layer's energies [b, s, e]; `entered` are the norms of its input, `left` [b, s, H] is its output."""
        preset = self._config.preset
        if preset == "paper":
            return entered - self.l1(left)
        out = self.l1(mlp.out)
        if preset == "mlp_block":
            return self.l1(mlp.normed) - out
        if preset == "down_proj":
            return self._l1_of_shards(mlp.activated) - out
        gate, up, activated = self._l1_of_shards(mlp.gate, mlp.up, mlp.activated).split(1, -1)
        after = torch.cat([gate, up, out], -1)
        if preset == "mlp_linears_out":
            return after
        normed = self.l1(mlp.normed)
        return torch.cat([normed, normed, activated], -1) - after

    def _l1_of_shards(self, *shards: Tensor) -> Tensor:
        """Return the norms [b, s, n] of n tensors of which this rank has [b, s, width / tp] each."""
        norms = torch.cat([self.l1(shard) for shard in shards], -1)
        if self._ranks.size() > 1:
            dist.all_reduce(norms, group=self._ranks)
            if self._config.norm:
                norms /= self._ranks.size()
        return norms
