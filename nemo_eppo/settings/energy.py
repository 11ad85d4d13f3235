"""Which energies are read."""

from typing import Literal

from pydantic import Field

from nemo_eppo.config import Config, ConfigError

Preset = Literal["paper", "mlp_block", "mlp_linears", "mlp_linears_out", "down_proj"]


ENERGIES: dict[str, int] = {"paper": 1, "mlp_block": 1, "mlp_linears": 3, "mlp_linears_out": 3, "down_proj": 1}


class EnergyProbeConfig(Config):
    """Which modules' energies are read: that of the paper, or one of those in its authors' code."""

    preset: Preset = "paper"
    """paper: the residual stream into and out of a decoder layer. mlp_block: its MLP. down_proj: the MLP's last
    projection. mlp_linears: gate, up and down projection, one energy each. mlp_linears_out: the same, outputs only."""
    layers: tuple[int, ...] = Field((-1,), min_length=1)
    """Decoder layers, counted from 0, negative ones from the end; the paper uses the last."""
    norm: bool = True
    """Divide each L1 norm by the width of its tensor, so that numbers compare across model sizes."""

    def energies_per_token(self) -> int:
        """E, the number of energies the probe reads for every token."""
        return ENERGIES[self.preset] * len(self.layers)

    def layer_indices(self, num_layers: int) -> list[int]:
        """Return the layers as non-negative indices; ConfigError if one does not exist."""
        for layer in self.layers:
            if not -num_layers <= layer < num_layers:
                raise ConfigError(f"energy.layers: {layer} is not a layer of a model with {num_layers} layers")
        return [layer % num_layers for layer in self.layers]

    def columns(self, layer: int, num_layers: int) -> list[slice]:
        """Where the energies of a layer, counted from 0, stand among the E of a token; empty if none are read."""
        size, wanted = ENERGIES[self.preset], self.layer_indices(num_layers)
        return [slice(place * size, (place + 1) * size) for place, index in enumerate(wanted) if index == layer]
