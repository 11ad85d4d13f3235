"""Everything that the reward of a batch of responses may depend on."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_eppo.algorithms.masking import require_finite
from nemo_eppo.rewards.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The source of one column of raw scores, a reward model or a function, and how it is standardised."""

    name: str
    """Name in error messages: the model's address, or the function's name."""
    weight: float = 1.0
    """Factor that the standardised score is multiplied by."""
    mean: float = 0.0
    """Subtracted from the score to standardise it: for a reward model, usually its mean on its validation data."""
    std: float = 1.0
    """The score is divided by this after the subtraction; above 0."""
    is_model: bool = True
    """True for a member of the ensemble of reward models; False for a function, which is added to its result."""


@dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """What the reward of B responses depends on; there are k columns of scores and E modules with energies."""

    scores: Tensor
    """[B, k] raw numbers, as reward models and functions gave them."""
    columns: Sequence[Column]
    """Where each of the k columns of `scores` comes from."""
    samples: Sequence[Sample]
    """The B prompts and responses, as text and token ids."""
    tokens: Tensor
    """int64 [B, S] token ids: prompt, response, padding."""
    prompt_lengths: Tensor
    """int64 [B] tokens of each prompt."""
    mask: Tensor
    """bool [B, T], T = S - 1: True where action `t` produced a response token."""
    truncated: Tensor
    """bool [B]: True if the response was cut off: it ended without EOS or a stop string."""
    logprobs: Tensor
    """[B, T] log-probs of the actions under the policy, in nats."""
    energies: Tensor
    """[B, E] mean energy loss of each response under the policy."""
    ref_logprobs: Tensor | None = None
    """[B, T] the same under the reference; None in a run that does not need them."""
    ref_energies: Tensor | None = None
    """[B, E] mean energy loss under the reference, of its own response to the prompt or of the policy's; None in a run
    without energy penalty."""
    latents: Tensor | None = None
    """[B, D] latents of the reward models, scaled so that those of SFT responses have mean 0 and covariance I; None if
    no model has any."""
    step: int
    """Number of the PPO step, from 1."""
    max_steps: int
    """Number of the last step of the run."""

    @property
    def response_lengths(self) -> Tensor:
        """int64 [B] tokens of each response, EOS included."""
        return self.mask.sum(dim=1)

    def validate(self) -> None:
        """Check shapes and look for NaN and infinities.

        Raises:
            ValueError: an input is wrong; the message names it, and the sample if a number is not finite.
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
