"""The policy and its frozen SFT reference in one set of modules: rollouts, log-probs and energies of both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_eppo.algorithms.energy import energy_mask, energy_window, response_energy
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
class Scores:
    """What one forward pass says about a rollout batch."""

    logprobs: Tensor
    """[B, T] of the tokens, 0 outside the response."""
    entropies: Tensor
    """[B, T] of the distributions they came from, 0 outside the response."""
    energies: Tensor | None
    """[B, E] mean energy loss of each response, if it was read."""


def next_token_targets(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, S]: the token that follows each position where it is a response token, else IGNORE."""
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = torch.where(mask, tokens[:, 1:], IGNORE)
    return targets


class Policy:
    """Everything a PPO step asks of the policy and of the reference; in and out go global batches, on every rank.

    Args:
        model: the policy's architecture.
        own_answers: how the reference answers a prompt whose energy loss the policy's is compared with.
        cache: of the energies of these answers; None forgets them with the process.
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

    def score(self, batch: RolloutBatch, energies: bool = True) -> Scores:
        """Log-probs, entropies and energies of the responses under the weights that the modules hold now."""
        targets = next_token_targets(batch.tokens, batch.mask)
        out, read = self.runner.infer(batch.tokens, batch.lengths, targets, outputs=2, energies=energies)
        losses = None
        if read is not None:
            window = energy_window(read, self.energy.window)
            mask = energy_mask(batch.prompt_lengths, batch.lengths, batch.sequence_length, self.energy.window)
            losses = response_energy(window, mask, self.energy.max_tokens)
        return Scores(out[:, :-1, 0], out[:, :-1, 1], losses)

    def score_reference(self, batch: RolloutBatch) -> Scores:
        """Log-probs under the reference, and its energies: on these responses, or on its own answers.

        Energies are None where nobody needs them: an unpenalised run does not generate own answers just to report.
        Leaves the engine asleep, maybe with the reference's weights: `refit` comes before the policy generates again.
        """
        same, needed = self.energy.reference == "same_response", self.energy.eta > 0
        with self.reference.active():
            scores = self.score(batch, energies=same)
            own = self._own_response_energies(batch) if needed and not same else scores.energies
        return Scores(scores.logprobs, scores.entropies, own)

    def _own_response_energies(self, batch: RolloutBatch) -> Tensor:
        """[B, E] energy losses of the reference's own answers; each prompt is answered once."""
        prompts = [batch.tokens[i, : int(batch.prompt_lengths[i])].tolist() for i in range(batch.batch_size)]
        keys = [prompt_digest(prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._own_energies}
        if new:
            self.refit()
            unanswered = list(new.values())
            answers = self.generate(unanswered, self._own_answers, torch.zeros(len(unanswered), dtype=torch.int64))
            self.engine.sleep()
            measured = self.score(RolloutBatch.from_completions(unanswered, answers, batch.pad_id)).energies
            assert measured is not None
            energies = measured.tolist()
            self._own_energies.update(zip(new, energies, strict=True))
            if self._cache is not None:
                cache, tokens = self._cache, [answer.token_ids for answer in answers]
                on_rank0(lambda: cache.append(list(zip(unanswered, tokens, energies, strict=True))))
        return torch.tensor([self._own_energies[key] for key in keys])
