"""Completions, a step's rollout as padded tensors and its experience; the order of its mini-batches, and its seeds."""

from array import array
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_eppo.algorithms.masking import require_finite, response_mask
from nemo_eppo.algorithms.sampling import counter_hash

_MINIBATCH_STREAM = 0x6D696E69  # keeps the order of mini-batches apart from the sampling seeds of the same step


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """The policy produced EOS or a stop string, with whose last token the response ends."""
    LENGTH = "length"
    """It reached its maximum length without either: it is truncated."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one prompt."""

    token_ids: list[int]
    """Token ids of the response, EOS included if there is one."""
    logprobs: Tensor
    """fp32 [n] log-prob of each of these n tokens under the distribution that the engine sampled from, in nats."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that produced it; it counts refits."""
    entropies: Tensor | None = None
    """fp32 [n] entropy of the distribution of each token, in nats; None from an engine that does not read it."""
    energies: Tensor | None = None
    """fp32 [n + 1, E] energies at the prompt's last token and at the response's; None as above."""

    def __reduce__(self) -> Any:
        """Travel between ranks as arrays: lists of numbers and tensors take several times as long to pickle."""
        read = (None if x is None else x.numpy() for x in (self.logprobs, self.entropies, self.energies))
        return _completion, (array("i", self.token_ids), str(self.finish_reason), self.weight_version, *read)


def _completion(token_ids: "array[int]", reason: str, version: int, *read: Any) -> Completion:
    logprobs, *others = (None if x is None else torch.from_numpy(x) for x in read)
    assert logprobs is not None
    return Completion(token_ids.tolist(), logprobs, FinishReason(reason), version, *others)


@dataclass(frozen=True)
class RolloutBatch:
    """B prompts with one response each. The batch of a step is the global one: the same on every rank."""

    tokens: Tensor
    """int64 [B, S] token ids: prompt, response, padding at the right."""
    prompt_lengths: Tensor
    """int64 [B] tokens of each prompt."""
    lengths: Tensor
    """int64 [B] tokens of prompt and response together."""
    truncated: Tensor
    """bool [B]: True if the response was cut off at its maximum length."""
    engine_logprobs: Tensor
    """fp32 [B, T] log-probs that the engine reported, in nats; zero outside the mask."""
    pad_id: int
    """Token id of the padding."""
    engine_entropies: Tensor | None = None
    """fp32 [B, T] entropies that the engine read, in nats, zero outside the mask; None if it reads none."""
    engine_energies: Tensor | None = None
    """fp32 [B, S, E] energies that the engine read, zero before a prompt's last token and in padding; None as above."""

    @classmethod
    def from_completions(cls, prompts: list[list[int]], completions: list[Completion], pad_id: int) -> "RolloutBatch":
        """Pad to the longest sample.

        Raises:
            ValueError: batch, a prompt or a response is empty, or there is not one log-prob per token.
        """
        if not prompts or len(prompts) != len(completions):
            raise ValueError(
                f"completions: {len(completions)} for {len(prompts)} prompts; expected one for each, at least one"
            )
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not prompt or not completion.token_ids:
                raise ValueError(
                    f"sample {i}: {'response' if prompt else 'prompt'} is empty; expected at least one token"
                )
            if len(completion.logprobs) != len(completion.token_ids):
                raise ValueError(
                    f"sample {i}: {len(completion.logprobs)} log-probs for {len(completion.token_ids)} tokens"
                )
        prompt_lengths = torch.tensor([len(p) for p in prompts])
        lengths = prompt_lengths + torch.tensor([len(c.token_ids) for c in completions])
        width = int(lengths.max())
        tokens = torch.full((len(prompts), width), pad_id)
        for row, prompt, completion in zip(tokens, prompts, completions, strict=True):
            ids = array("q", prompt + completion.token_ids)  # several times as fast as torch.tensor
            row[: len(ids)] = torch.frombuffer(ids, dtype=torch.int64)

        def padded(parts: list[Tensor | None], width: int) -> Tensor | None:
            """Pad to `width` positions; the first entry of each part belongs to its prompt's last token."""
            if parts[0] is None:
                return None
            rows = torch.zeros(len(parts), width, *parts[0].shape[1:])
            for row, prompt, part in zip(rows, prompts, parts, strict=True):
                assert part is not None, "some of the completions come from another engine"
                row[len(prompt) - 1 : len(prompt) - 1 + len(part)] = part
            return rows

        logprobs = padded([c.logprobs for c in completions], width - 1)
        assert logprobs is not None
        return cls(
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            truncated=torch.tensor([c.finish_reason == FinishReason.LENGTH for c in completions]),
            engine_logprobs=logprobs,
            pad_id=pad_id,
            engine_entropies=padded([c.entropies for c in completions], width - 1),
            engine_energies=padded([c.energies for c in completions], width),
        )

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def sequence_length(self) -> int:
        """S, the padded length."""
        return self.tokens.shape[1]

    @cached_property
    def mask(self) -> Tensor:
        """Return bool [B, T], T = S - 1: True where action `t` produced a response token."""
        return response_mask(self.prompt_lengths, self.lengths, self.sequence_length)

    def with_padding(self, sequence_length: int) -> "RolloutBatch":
        """Return the same samples padded to `sequence_length`; ValueError if one is longer."""
        longest = int(self.lengths.max())
        if sequence_length < longest:
            raise ValueError(f"sequence_length: {sequence_length}; expected at least {longest}, the longest sample")
        extra = sequence_length - self.sequence_length

        def extended(x: Tensor | None, fill: int = 0) -> Any:
            return None if x is None else F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra), value=fill)

        return replace(
            self,
            tokens=extended(self.tokens, self.pad_id),
            engine_logprobs=extended(self.engine_logprobs),
            engine_entropies=extended(self.engine_entropies),
            engine_energies=extended(self.engine_energies),
        )

    def select(self, indices: Tensor) -> "RolloutBatch":
        """The samples at `indices` [n], in that order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: Any = {name: x[indices] for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What PPO knows about a rollout batch before it trains on it, for E modules with energies."""

    mask: Tensor
    """bool [B, T]: True where action `t` produced a response token."""
    logprobs: Tensor
    """[B, T] log-probs under the policy that sampled, computed by the trainer, in nats."""
    ref_logprobs: Tensor | None = None
    """[B, T] log-probs under the reference; None if nothing needs them."""
    values: Tensor | None = None
    """[B, T] the critic's values; None without a critic."""
    energies: Tensor
    """[B, E] mean energy loss of each response under the policy."""
    ref_energies: Tensor | None = None
    """[B, E] mean energy loss under the reference; None without energy penalty."""
    rewards: Tensor
    """[B, T] shaped reward of each action."""
    advantages: Tensor
    """[B, T] advantage of each action."""
    returns: Tensor | None = None
    """[B, T] that the critic's values are trained towards; None without a critic."""

    def select(self, indices: Tensor) -> "Experience":
        """The samples at `indices` [n], in that order."""
        chosen: Any = {name: None if x is None else x[indices] for name, x in self._tensors().items()}
        return Experience(**chosen)

    def validate(self) -> None:
        """Check the shape of every field, and that values, rewards, advantages and returns are finite.

        `RewardInputs.validate` has checked log-probs and energies in the same step.

        Raises:
            ValueError: a field has a wrong shape, or NaN or infinity inside the mask; the message names it.
        """
        for name, x in self._tensors().items():
            if x is None:
                continue
            per_token = name not in ("energies", "ref_energies")
            if (x.shape != self.mask.shape) if per_token else (x.dim() != 2 or len(x) != len(self.mask)):
                expected = tuple(self.mask.shape) if per_token else f"({len(self.mask)}, E)"
                raise ValueError(f"{name}: shape {tuple(x.shape)}; expected {expected}")
            if name in ("values", "rewards", "advantages", "returns"):
                require_finite(name, x, self.mask)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def step_seed(run_seed: int, step: int) -> int:
    """Return the 64-bit seed of a step; neighbouring runs and steps have unrelated ones."""
    return int(counter_hash(torch.tensor(run_seed), torch.tensor(step)))


def seeds_for(seed: int, prompt_indices: Tensor) -> Tensor:
    """Return one sampling seed for each sample: int64 [n].

    Args:
        seed: the step's, see `step_seed`.
        prompt_indices: int64 [n] positions in the global batch, so neither layout nor order changes a sample's seed.
    """
    return counter_hash(torch.tensor(seed), prompt_indices)


def minibatches(batch_size: int, mini_batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Split a shuffled global batch: int64 index tensors of `mini_batch_size` samples, the same in every layout.

    Args:
        batch_size: B of the global batch.
        mini_batch_size: samples for one update; must divide `batch_size`.
        seed: the step's, see `step_seed`.
        epoch: number of the pass over the batch; each has its own order.
    """
    if mini_batch_size < 1 or batch_size % mini_batch_size:
        raise ValueError(f"mini_batch_size: {mini_batch_size}; expected a divisor of the batch of {batch_size}")
    stream = counter_hash(torch.tensor(seed ^ _MINIBATCH_STREAM), torch.tensor(epoch))
    order = counter_hash(stream, torch.arange(batch_size)).argsort(stable=True)
    return list(order.split(mini_batch_size))
