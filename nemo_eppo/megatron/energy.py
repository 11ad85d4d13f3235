"""The energy probe: L1 norms of what enters and leaves chosen modules, read from forward passes that run anyway.

The energy loss of a layer at one token is E(h_in) - E(h_out) with E the L1 norm (EPPO, arXiv 2501.19358, section 3).
Hooks reduce each [tokens, width] tensor to one number per token on the rank that holds it. What the layout splits is
put together: widths are summed over tensor-parallel ranks, sequences gathered, pipeline stages added once per pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import device
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.specs import has_transformer_engine
from nemo_eppo.settings.energy import EnergyProbeConfig, Preset

_BESIDE_FUSED_NORMS: tuple[Preset, ...] = ("paper", "mlp_linears_out", "down_proj")  # need no output of a norm


def readable_presets() -> tuple[Preset, ...]:
    """Return the presets that can be read on this machine: TransformerEngine, which fuses norms, leaves three."""
    return _BESIDE_FUSED_NORMS if has_transformer_engine() else get_args(Preset)


def l1_norms(hidden: Tensor, config: EnergyProbeConfig, width: int | None = None) -> Tensor:
    """L1 norms [..., 1], fp32, of hidden states [..., H]; with `config.norm` divided by `width` (H if None)."""
    norms = hidden.abs().sum(-1, keepdim=True, dtype=torch.float32)
    return norms / (width or hidden.size(-1)) if config.norm else norms


def l1_norms_of_shards(config: EnergyProbeConfig, group: dist.ProcessGroup, *shards: Tensor) -> Tensor:
    """L1 norms [..., n] of n tensors whose width is split over the ranks of `group`, each shard [..., width / tp]."""
    norms = torch.cat([l1_norms(shard, config, shard.size(-1) * group.size()) for shard in shards], dim=-1)
    if group.size() > 1:
        dist.all_reduce(norms, group=group)
    return norms


class EnergyProbe:
    """Hooks on the chosen layers of this rank's model chunks; it reads only inside `recording()`."""

    def __init__(self, config: EnergyProbeConfig, chunks: Sequence[Any], num_layers: int) -> None:
        self.config = config
        self._only_outputs = config.preset == "mlp_linears_out"
        self.sequence_parallel = bool(unwrap(chunks[0]).config.sequence_parallel)
        # first column of a layer's energies -> one [s, b, e] per micro-batch
        self._passes: dict[int, list[Tensor]] = {}
        self._gate_up: dict[int, Tensor] = {}  # energies of gate and up that wait for those of down
        self._recording = False
        for chunk in chunks:
            for layer in unwrap(chunk).decoder.layers:
                # checked on every rank, so that all fail together and none is left waiting for the others
                if hasattr(layer.mlp.linear_fc1, "layer_norm_weight") and config.preset not in _BESIDE_FUSED_NORMS:
                    raise ConfigError(
                        f"energy.preset = {config.preset!r} reads the input of the MLP's first projection, which "
                        "TransformerEngine fuses with its norm; use 'paper', 'mlp_linears_out' or 'down_proj'"
                    )
                for columns in config.columns(layer.layer_number - 1, num_layers):
                    self._attach(layer, columns.start)

    def energies_per_token(self) -> int:
        """E, the number of energies that are read for every token."""
        return self.config.energies_per_token()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Read the energies of every micro-batch run inside the block; outside it the hooks do nothing."""
        self._passes = {column: [] for column in self._passes}
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    @torch.no_grad()
    def collect(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the energies of the recorded pass, the same on every tensor- and pipeline-parallel rank.

        Args:
            shapes: (b, s) of each micro-batch, in the order in which they were run.

        Returns:
            one [b, s, E] fp32 tensor per micro-batch; entry s is the token at that position.
        """
        total = sum(b * s for b, s in shapes)
        energies = torch.zeros(total, self.config.energies_per_token(), device=device.device())
        for column, passes in self._passes.items():
            if len(passes) != len(shapes):
                raise RuntimeError(f"energy probe saw {len(passes)} micro-batches, expected {len(shapes)}")
            rows = torch.cat([e.transpose(0, 1).flatten(0, 1) for e in passes])
            energies[:, column : column + rows.size(1)] = rows
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.all_reduce(energies, group=group)
        sizes = [b * s for b, s in shapes]
        return [e.view(b, s, -1) for e, (b, s) in zip(energies.split(sizes), shapes, strict=True)]

    def _attach(self, layer: Any, column: int) -> None:
        self._passes[column] = []
        mlp, preset = layer.mlp, self.config.preset
        if preset in ("paper", "mlp_block"):
            block = layer if preset == "paper" else mlp
            block.register_forward_hook(partial(self._read_block, column), with_kwargs=True)
            return
        if preset != "down_proj":
            mlp.linear_fc1.register_forward_hook(partial(self._read_gate_up, column))
        mlp.linear_fc2.register_forward_hook(partial(self._read_down, column))

    def _listening(self) -> bool:
        # a checkpointed layer runs again with gradients during the backward: only its first run counts
        return self._recording and not (is_checkpointing() and torch.is_grad_enabled())

    def _read_block(self, column: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._listening():
            entering = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._passes[column].append(self._l1(entering) - self._l1(output[0]))

    def _read_gate_up(self, column: int, module: Any, args: Any, output: Any) -> None:
        if self._listening():
            gate, up = output[0].chunk(2, dim=-1)
            leaving = self._l1_of_shards(gate, up)
            self._gate_up[column] = leaving if self._only_outputs else self._l1(args[0]) - leaving

    def _read_down(self, column: int, module: Any, args: Any, output: Any) -> None:
        if self._listening():
            leaving = self._l1(output[0])
            down = leaving if self._only_outputs else self._l1_of_shards(args[0]) - leaving
            gate_up = self._gate_up.pop(column, None)
            self._passes[column].append(down if gate_up is None else torch.cat([gate_up, down], dim=-1))

    @torch.no_grad()
    def _l1(self, hidden: Tensor) -> Tensor:
        """L1 norms [s, b, 1] of hidden states [s, b, H], of which this rank may hold a part of the sequence."""
        norms = l1_norms(hidden, self.config)
        if not self.sequence_parallel:
            return norms
        group = parallel_state.get_tensor_model_parallel_group()
        shards = [torch.empty_like(norms) for _ in range(group.size())]
        dist.all_gather(shards, norms, group=group)
        return torch.cat(shards)

    @torch.no_grad()
    def _l1_of_shards(self, *shards: Tensor) -> Tensor:
        """L1 norms [s, b, n] of hidden states [s, b, width / tp] whose width is split over tensor-parallel ranks."""
        return l1_norms_of_shards(self.config, parallel_state.get_tensor_model_parallel_group(), *shards)


class EnergyProbes:
    """Several probes that read the same passes; their energies stand side by side, in the order of `configs`."""

    def __init__(self, configs: Sequence[EnergyProbeConfig], chunks: Sequence[Any], num_layers: int) -> None:
        self._probes = [EnergyProbe(config, chunks, num_layers) for config in configs]

    def energies_per_token(self) -> int:
        """E, the number of energies that all probes read for every token."""
        return sum(probe.energies_per_token() for probe in self._probes)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """As `EnergyProbe.recording`."""
        with ExitStack() as stack:
            for probe in self._probes:
                stack.enter_context(probe.recording())
            yield

    def collect(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """As `EnergyProbe.collect`."""
        parts = [probe.collect(shapes) for probe in self._probes]
        return [torch.cat(energies, dim=-1) for energies in zip(*parts, strict=True)]
