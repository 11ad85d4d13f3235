"""The policy and its frozen SFT reference in one set of modules: rollouts, log-probs and energies of both."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_eppo.algorithms.energy import energy_window, response_energy
from nemo_eppo.generation.build import build_engine
from nemo_eppo.generation.engine import Engine
from nemo_eppo.generation.refit import RefitError
from nemo_eppo.megatron.collectives import on_rank0, over_replicas
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.rollout.batch import Completion, RolloutBatch
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig
from nemo_eppo.settings.ppo import AnsweringConfig, EnergyConfig
from nemo_eppo.training.energy_cache import EnergyCache, prompt_digest
from nemo_eppo.training.setup import Plan


@dataclass(frozen=True)
class PolicyOutputs:
    """Outputs of the policy, or of the reference, on a rollout batch."""

    logprobs: Tensor
    """Log-probs [B, T] of the response tokens, 0 outside the response."""
    entropies: Tensor
    """Entropies [B, T] in nats of the distributions at the response tokens, 0 outside the response."""
    energies: Tensor
    """Mean energy losses [B, E] of each response; [B, 0] if they were not read."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """Results of the reference; None for what the run does not need."""

    logprobs: Tensor | None
    """Log-probs [B, T] of the policy's response tokens, 0 outside the response."""
    energies: Tensor | None
    """Mean energy losses [B, E] of the reference on its own answers or on the policy's responses."""


def build_policy(
    planned: Plan,
    config: AnsweringConfig,
    runner: ModelRunner,
    reference: FrozenWeights | AdaptersOff,
    cache: EnergyCache | None,
    run_directory: Path,
) -> "Policy":
    """Build the engine of a runner's model, and the policy with it; collective. The caller closes `policy.engine`."""
    engine = build_engine(
        config.engine,
        runner.chunks,
        planned.model,
        planned.tokenizer,
        planned.tokenizer_path,
        config.longest,
        config.energy,
        run_directory,
    )
    return Policy(runner, planned.model, reference, engine, config.energy, config.generation.as_greedy, cache)


def next_token_targets(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return [B, S]: at each position the token that follows if it is a response token, else IGNORE."""
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = torch.where(mask, tokens[:, 1:], IGNORE)
    return targets


class Policy:
    """Policy and reference for a PPO step. Methods take and return global batches, the same on every rank.

    Args:
        model: the policy's architecture.
        energy: which energies are read, and on which responses the reference's are read.
        own_answers: sampling parameters of the reference's own answers.
        cache: keeps the energies of these answers on disk; None keeps them only as long as the process runs.
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
        """Number of refits in this process, those with the reference's weights included."""
        self._own_answers, self._cache = own_answers, cache
        self._own_energies: dict[bytes, list[float]] = on_rank0(cache.load) if cache else {}

    def refit(self) -> None:
        """Give the engine the weights that the modules hold now, under the next version number."""
        self.weight_version += 1
        self.engine.refit(export_tensors(self.runner.chunks, self.model), self.weight_version)

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: Tensor) -> list[Completion]:
        """Generate one completion per prompt; the replicas share the work.

        Raises:
            RefitError: a completion was made with other weights than those of the last refit.
        """

        def replica(mine: list[int]) -> list[Completion]:
            return self.engine.generate([prompts[i] for i in mine], sampling, [int(seeds[i]) for i in mine])

        completions = over_replicas([len(prompt) for prompt in prompts], replica)
        if stale := {completion.weight_version for completion in completions} - {self.weight_version}:
            raise RefitError(f"completions have the weight versions {stale}, expected {self.weight_version}")
        return completions

    def infer(self, batch: RolloutBatch, energies: bool = True) -> PolicyOutputs:
        """Compute log-probs, entropies and energies of the responses under the weights that the modules hold now."""
        targets = next_token_targets(batch.tokens, batch.mask)
        out, read = self.runner.infer(batch.tokens, batch.lengths, targets, outputs=2, energies=energies)
        return PolicyOutputs(out[:, :-1, 0], out[:, :-1, 1], self._response_energies(batch, read))

    def read(self, batch: RolloutBatch) -> PolicyOutputs:
        """Return these outputs under the weights that generated the batch: the engine's, else `infer`'s."""
        if batch.engine_entropies is None:
            return self.infer(batch)
        energies = self._response_energies(batch, batch.engine_energies)
        return PolicyOutputs(batch.engine_logprobs, batch.engine_entropies, energies)

    def _response_energies(self, batch: RolloutBatch, energies: Tensor | None) -> Tensor:
        """Average the energies [B, S, E] of all tokens over each response, [B, E]; [B, 0] for None."""
        if energies is None:
            return torch.zeros(batch.batch_size, 0)
        return response_energy(energy_window(energies, self.energy.window), batch.mask, self.energy.max_tokens)

    def infer_reference(
        self, batch: RolloutBatch, prompts: list[list[int]], *, logprobs: bool, energies: bool
    ) -> ReferenceOutputs:
        """Compute what is needed from the reference; energies are also returned where they cost no extra pass.

        The engine is left asleep and may hold the reference's weights: call `refit` before the policy generates again.

        Args:
            prompts: token ids of the batch's prompts.
            logprobs: whether the log-probs of the responses are needed.
            energies: whether the energies are needed.
        """
        same_response = self.energy.reference == "same_response"
        unanswered = self.unanswered(prompts) if energies and not same_response else []
        reads_responses = logprobs or (energies and same_response)
        outputs = ref_energies = None
        if reads_responses or unanswered:
            with self.reference.active():
                if reads_responses:
                    outputs = self.infer(batch, energies=same_response)
                if unanswered:
                    self.answer(unanswered, batch.pad_id)
        if same_response and outputs is not None:
            ref_energies = outputs.energies
        elif energies:
            ref_energies = torch.tensor([self._own_energies[prompt_digest(prompt)] for prompt in prompts])
        return ReferenceOutputs(outputs.logprobs if outputs else None, ref_energies)

    def unanswered(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return the prompts, each once, that the reference has answered neither in this job nor in one that shares the
        cache."""
        by_key = {prompt_digest(prompt): prompt for prompt in prompts}
        if self._cache is not None and not by_key.keys() <= self._own_energies.keys():
            self._own_energies |= on_rank0(self._cache.load)
        return [prompt for key, prompt in by_key.items() if key not in self._own_energies]

    def answer(self, prompts: list[list[int]], pad_id: int) -> None:
        """Answer prompts with the reference, whose weights the modules hold, and keep its energy losses."""
        self.refit()
        answers = self.generate(prompts, self._own_answers, torch.zeros(len(prompts), dtype=torch.int64))
        self.engine.sleep()
        energies = self.read(RolloutBatch.from_completions(prompts, answers, pad_id)).energies.tolist()
        self._own_energies.update(zip(map(prompt_digest, prompts), energies, strict=True))
        if self._cache is not None:
            cache, tokens = self._cache, [answer.token_ids for answer in answers]
            on_rank0(lambda: cache.append(list(zip(prompts, tokens, energies, strict=True))))
