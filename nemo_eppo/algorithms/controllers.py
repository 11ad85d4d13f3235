"""Coefficients of the KL penalty: a fixed one, and one that steers the KL to a target (Ziegler et al. 2019, arXiv
1909.08593)."""

from typing import Any


class FixedCoefficient:
    """A coefficient that never changes."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, n: int) -> None:
        """Do nothing; it exists so that both controllers have the same methods."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the configured value, so that a run may be resumed with another coefficient."""


class AdaptiveKLController:
    """A coefficient that `update` changes by `value *= 1 + e * n / horizon`, `e = clip(kl / target - 1, -0.2, 0.2)`."""

    def __init__(self, value: float, target: float, horizon: int) -> None:
        """Start at `value`; steer the mean KL of a response to `target` nats, over about `horizon` responses."""
        for name, setting in (("value", value), ("target", target), ("horizon", horizon)):
            if setting <= 0:
                raise ValueError(f"{name}: {setting}; expected a positive number")
        self.value = value
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Take in the mean KL, in nats, of `n` responses."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])
