"""The energies of `megatron.energy`, read while decoding: the same numbers, without another forward pass."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eppo.megatron.energy import l1_norms, l1_norms_of_shards
from nemo_eppo.settings.energy import EnergyProbeConfig


class MLPTensors(NamedTuple):
    """Tensors of a layer's MLP, whose F channels are split over tensor-parallel ranks."""

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

    def __init__(self, config: EnergyProbeConfig, tensor_ranks: dist.ProcessGroup) -> None:
        self._config, self._ranks = config, tensor_ranks

    def l1(self, hidden: Tensor) -> Tensor:
        """Return the L1 norms [b, s, 1] of hidden states [b, s, H]."""
        return l1_norms(hidden, self._config)

    def read(self, entering: Tensor, mlp: MLPTensors, leaving: Tensor) -> Tensor:
        """Return a layer's energies [b, s, e]. `entering`: L1 norms of its input; `leaving`: its output [b, s, H]."""
        preset = self._config.preset
        if preset == "paper":
            return entering - self.l1(leaving)
        out = self.l1(mlp.out)
        if preset == "mlp_block":
            return self.l1(mlp.normed) - out
        if preset == "down_proj":
            return self._l1_of_shards(mlp.activated) - out
        assert preset in ("mlp_linears", "mlp_linears_out")
        gate, up, activated = self._l1_of_shards(mlp.gate, mlp.up, mlp.activated).split(1, -1)
        after = torch.cat([gate, up, out], -1)
        if preset == "mlp_linears_out":
            return after
        normed = self.l1(mlp.normed)
        return torch.cat([normed, normed, activated], -1) - after

    def _l1_of_shards(self, *shards: Tensor) -> Tensor:
        return l1_norms_of_shards(self._config, self._ranks, *shards)
