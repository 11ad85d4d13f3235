"""The interface of generation engines, and the checks that all of them share."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig


class Engine(Protocol):
    """Answers prompts with the policy's current weights.

    A response depends on its seed, its prompt, the weights and the sampling settings: not on the other prompts, their
    order, the batch size or the parallel layout.

    A step calls refit, generate (any number of times) and sleep, in this order. All ranks of the job call each method;
    `generate` gets the share of this rank's replica, the same on all ranks of the replica, which may be empty.
    To add an engine, write its class in this room and enter it in `build.py`.
    """

    def refit(self, named_weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Take over new weights (whole tensors under Hugging Face names) as `version`, after taking the memory that
        `sleep` freed; collective.

        An engine that reads the trainer's own weights ignores them and accepts None.

        Raises:
            RefitError: the refit is incomplete, reordered, stale or corrupted; the engine has no weights until a
                complete one.
        """

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """Return one completion for each prompt, in order, with log-probs under the distribution sampled from, after
        penalty, temperature and filters (TensorRT-LLM's are those before filters). A response ends where `Stops` says.
        Each engine defines the log-probs of greedy responses.

        Raises:
            ConfigError: an input that cannot work, named by its index (`check_requests`); nothing was computed.
        """

    def sleep(self) -> None:
        """Free the memory that only generation needs; a refit has to come before the next `generate`."""

    def close(self) -> None:
        """End the processes that the engine has started."""


class EngineLimits(NamedTuple):
    """Special tokens and sizes that every engine is built for."""

    eos_id: int
    """The token that ends a response."""
    pad_id: int
    """Fills batches; never part of a response."""
    max_batch_size: int
    """Sequences decoded at once, per pipeline stage; when one ends, the next prompt takes its place."""
    max_sequence_length: int
    """Longest prompt and response together, in tokens."""
    tokenizer: Tokenizer | None = None
    """Finds stop strings; may be None where there are none."""

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError if no engine of this model can have these limits."""
        if not 2 <= self.max_sequence_length <= model.max_sequence_length:
            raise ConfigError(
                f"max_sequence_length = {self.max_sequence_length}: expected 2 to {model.max_sequence_length}, "
                "the model's longest sequence"
            )
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size = {self.max_batch_size}: expected at least 1")
        for name, token in (("eos_id", self.eos_id), ("pad_id", self.pad_id)):
            if not 0 <= token < model.vocab_size:
                raise ConfigError(f"{name} = {token}: expected 0 to {model.vocab_size - 1}")


def check_requests(prompt_ids: list[list[int]], seeds: list[int], vocab_size: int, max_sequence_length: int) -> None:
    """Raise ConfigError for a prompt or seed that cannot work, named by its index."""
    if len(seeds) != len(prompt_ids):
        raise ConfigError(f"seeds: {len(seeds)} for {len(prompt_ids)} prompts; expected one for each")
    for i, (prompt, seed) in enumerate(zip(prompt_ids, seeds, strict=True)):
        if not 1 <= len(prompt) < max_sequence_length:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens; expected 1 to {max_sequence_length - 1}, so that a "
                f"response fits into max_sequence_length = {max_sequence_length}"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ConfigError(
                f"prompt {i} has tokens from {min(prompt)} to {max(prompt)}; expected 0 to {vocab_size - 1}"
            )
        if not -(2**63) <= seed < 2**63:
            raise ConfigError(f"seed {i} is {seed}; expected a 64-bit integer")
