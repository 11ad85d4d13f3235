"""The contribution of each term to the reward of each sample; they add up to the final reward."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Ledger:
    """One entry per metric name, fp64 [B] each."""

    contributions: dict[str, Tensor] = field(default_factory=dict)
    """The contribution of each term, in the order of application; they sum to `reward/final` to 1e-6."""
    observations: dict[str, Tensor] = field(default_factory=dict)
    """Numbers that are reported but not part of the sum: raw scores, energies, KL."""

    @property
    def entries(self) -> dict[str, Tensor]:
        """All contributions, `reward/final` and all observations, by name."""
        final = torch.stack(list(self.contributions.values())).sum(dim=0)
        return {**self.contributions, "reward/final": final, **self.observations}

    def rows(self) -> list[dict[str, float]]:
        """One flat dictionary per sample."""
        columns = {name: x.tolist() for name, x in self.entries.items()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def means(self) -> dict[str, float]:
        """The mean of every entry over the batch."""
        return {name: x.mean().item() for name, x in self.entries.items()}
