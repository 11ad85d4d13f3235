"""What every generation engine does, whatever computes the tokens."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from nemo_eppo.rollout.batch import Completion
from nemo_eppo.rollout.sampling import SamplingParams


class Engine(Protocol):
    """Answers prompts with the policy's current weights.

    A response depends on its seed, its prompt, the weights and the sampling settings: not on the other prompts, their
    order, the batch size or the parallel layout.
    """

    def refit(self, named_weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Take over new weights (whole tensors under Hugging Face names) and call them `version`.

        An engine that reads the trainer's own weights takes None.
        """

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """One completion for each prompt, in their order.

        Raises:
            ConfigError: an input that cannot work, named by its index; nothing was computed.
        """

    def sleep(self) -> None:
        """Free the memory that only generation needs."""

    def wake(self) -> None:
        """Get ready to generate again."""
