"""Everything that the reward of a batch of responses may depend on."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_eppo.algorithms.masking import require_finite
from nemo_eppo.rewards.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of raw scores: a reward model, or a function."""

    name: str
    """Name in messages: the model's address, or the function's name."""
    weight: float = 1.0
    """Factor of the standardised score."""
    mean: float = 0.0
    """Mean that is subtracted from the score: a reward model's own on its validation data."""
    std: float = 1.0
    """Standard deviation that the score is then divided by."""
    is_model: bool = True
    """Whether it belongs to the ensemble of reward models; functions are added to what the ensemble gives."""


@dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """What the reward of B responses depends on; k columns of scores, E energy modules."""

    scores: Tensor
    """[B, k] as reward models and functions gave them."""
    columns: Sequence[Column]
    """What each column of `scores` is."""
    samples: Sequence[Sample]
    """The B prompts and responses, as text and token ids."""
    tokens: Tensor
    """int64 [B, S]: prompt, response, padding."""
    prompt_lengths: Tensor
    """int64 [B]."""
    mask: Tensor
    """bool [B, T]."""
    truncated: Tensor
    """bool [B]: the response ended without EOS."""
    logprobs: Tensor
    """[B, T] of the policy."""
    energies: Tensor
    """[B, E] mean energy loss of each response under the policy."""
    ref_logprobs: Tensor | None = None
    """[B, T] of the reference; None in a run that does not need them."""
    ref_energies: Tensor | None = None
    """[B, E] under the reference, on its own answer or on the same one; None in a run without energy penalty."""
    latents: Tensor | None = None
    """[B, D] of the reward models, in coordinates in which those of SFT responses have mean 0 and covariance I."""
    step: int
    """1 for the first step of the run."""
    max_steps: int
    """The last step of the run."""

    @property
    def response_lengths(self) -> Tensor:
        """int64 [B], EOS included."""
        return self.mask.sum(dim=1)

    def validate(self) -> None:
        """Check shapes and look for NaN and infinities.

        Raises:
            ValueError: naming the quantity, and the sample.
        """
        if not 1 <= self.step <= self.max_steps:
            raise ValueError(f"step: {self.step}; expected 1 to max_steps = {self.max_steps}")
        batch, actions = self.mask.shape
        if len(self.samples) != batch:
            raise ValueError(f"samples: {len(self.samples)}; expected {batch}")
        width = self.latents.shape[-1] if self.latents is not None else 0
        modules = self.energies.shape[-1]
        for name, x, shape, mask in (
            ("scores", self.scores, (batch, len(self.columns)), None),
            ("tokens", self.tokens, (batch, actions + 1), None),
            ("truncated", self.truncated, (batch,), None),
            ("energies", self.energies, (batch, modules), None),
            ("ref_energies", self.ref_energies, (batch, modules), None),
            ("latents", self.latents, (batch, width), None),
            ("logprobs", self.logprobs, (batch, actions), self.mask),
            ("ref_logprobs", self.ref_logprobs, (batch, actions), self.mask),
        ):
            if x is None:
                continue
            if x.shape != shape:
                raise ValueError(f"{name}: shape {tuple(x.shape)}; expected {shape}")
            require_finite(name, x, mask)
