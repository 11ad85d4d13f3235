"""The policy and its frozen SFT reference in one set of modules: rollouts, log-probs and energies of both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_eppo.algorithms.energy import energy_window, response_energy
from nemo_eppo.generation.engine import Engine
from nemo_eppo.generation.refit import RefitError
from nemo_eppo.megatron.collectives import on_rank0, over_replicas
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.models.model_config import ModelConfig
from nemo_eppo.rollout.batch import Completion, RolloutBatch
from nemo_eppo.rollout.sampling import SamplingParams
from nemo_eppo.training.energy_cache import EnergyCache, prompt_digest
from nemo_eppo.training.ppo_config import EnergyConfig


@dataclass(frozen=True)
class PolicyOutputs:
    """What one forward pass says about a rollout batch."""

    logprobs: Tensor
    """[B, T] of the tokens, 0 outside the response."""
    entropies: Tensor
    """[B, T] of the distributions they came from, 0 outside the response."""
    energies: Tensor
    """[B, E] mean energy loss of each response; [B, 0] if it was not read."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """What the reference says; None for what the run does not need."""

    logprobs: Tensor | None
    """[B, T] of the responses' tokens, 0 outside the response."""
    energies: Tensor | None
    """[B, E] mean energy loss, on its own answers or on the same responses."""


def next_token_targets(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, S]: the token that follows each position where it is a response token, else IGNORE."""
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = torch.where(mask, tokens[:, 1:], IGNORE)
    return targets


class Policy:
    """Everything a PPO step asks of the policy and of the reference; in and out go global batches, on every rank.

    Args:
        model: the policy's architecture.
        energy: which energies are read, and what the reference's are read on.
        own_answers: how the reference answers a prompt whose energy loss the policy's is compared with.
        cache: keeps the energies of these answers; None forgets them with the process.
    """

    def __init__(
        self,
        runner: ModelRunner,
        model: ModelConfig,
        reference: FrozenWeights | AdaptersOff,
        engine: Engine,
        energy: EnergyConfig,
        own_answers: SamplingParams,
        cache: EnergyCache | None = None,
    ) -> None:
        self.runner, self.model, self.reference, self.engine, self.energy = runner, model, reference, engine, energy
        self.weight_version = 0
        """Counts the refits of this process, the reference's included."""
        self._own_answers, self._cache = own_answers, cache
        self._own_energies: dict[bytes, list[float]] = on_rank0(cache.load) if cache else {}

    def refit(self) -> None:
        """Wake the engine and give it the weights that the modules hold now, under the next version number."""
        self.weight_version += 1
        self.engine.wake()
        self.engine.refit(export_tensors(self.runner.chunks, self.model), self.weight_version)

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: Tensor) -> list[Completion]:
        """One completion per prompt, the replicas sharing the work.

        Raises:
            RefitError: a completion was made by other weights than the last refit's.
        """

        def replica(mine: list[int]) -> list[Completion]:
            return self.engine.generate([prompts[i] for i in mine], sampling, [int(seeds[i]) for i in mine])

        completions = over_replicas([len(prompt) for prompt in prompts], replica)
        if stale := {completion.weight_version for completion in completions} - {self.weight_version}:
            raise RefitError(f"stale completions: of weight versions {stale}, expected {self.weight_version}")
        return completions

    def infer(self, batch: RolloutBatch, energies: bool = True) -> PolicyOutputs:
        """Log-probs, entropies and energies of the responses under the weights that the modules hold now."""
        targets = next_token_targets(batch.tokens, batch.mask)
        out, read = self.runner.infer(batch.tokens, batch.lengths, targets, outputs=2, energies=energies)
        losses = torch.zeros(batch.batch_size, 0)
        if read is not None:
            losses = response_energy(energy_window(read, self.energy.window), batch.mask, self.energy.max_tokens)
        return PolicyOutputs(out[:, :-1, 0], out[:, :-1, 1], losses)

    def infer_reference(
        self, batch: RolloutBatch, prompts: list[list[int]], *, logprobs: bool, energies: bool
    ) -> ReferenceOutputs:
        """What the reference says, as far as it is needed; energies also where they cost nothing.

        Leaves the engine asleep, maybe with the reference's weights: `refit` comes before the policy generates again.

        Args:
            prompts: token ids of the batch's prompts.
            logprobs: whether the log-probs of the responses are needed.
            energies: whether the energies are needed.
        """
        same = self.energy.reference == "same_response"
        reads_responses = logprobs or (energies and same)
        if not reads_responses and not energies:
            return ReferenceOutputs(None, None)
        outputs = own = None
        with self.reference.active():
            if reads_responses:
                outputs = self.infer(batch, energies=same)
            if energies and not same:
                own = self._own_response_energies(prompts, batch.pad_id)
        if outputs is None:
            return ReferenceOutputs(None, own)
        return ReferenceOutputs(outputs.logprobs, outputs.energies if same else own)

    def _own_response_energies(self, prompts: list[list[int]], pad_id: int) -> Tensor:
        """[B, E] energy losses of the reference's own answers; each prompt is answered once."""
        keys = [prompt_digest(prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._own_energies}
        if new:
            self.refit()
            unanswered = list(new.values())
            answers = self.generate(unanswered, self._own_answers, torch.zeros(len(unanswered), dtype=torch.int64))
            self.engine.sleep()
            energies = self.infer(RolloutBatch.from_completions(unanswered, answers, pad_id)).energies.tolist()
            self._own_energies.update(zip(new, energies, strict=True))
            if self._cache is not None:
                cache, tokens = self._cache, [answer.token_ids for answer in answers]
                on_rank0(lambda: cache.append(list(zip(unanswered, tokens, energies, strict=True))))
        return torch.tensor([self._own_energies[key] for key in keys])
