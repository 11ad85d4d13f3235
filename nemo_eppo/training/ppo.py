"""PPO with the energy-loss penalty, the actor's side: one step from prompts to updated policy and critic.

Per-token tensors are [B, T] over the *global* rollout batch and equal on every rank (nemo_eppo/README.md). Every rank
computes the same rewards, advantages and order of mini-batches.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nemo_eppo.algorithms.advantages import ESTIMATORS
from nemo_eppo.algorithms.divergences import divergence_slope, sequence_divergence
from nemo_eppo.algorithms.masking import masked_mean
from nemo_eppo.algorithms.objective import PolicyObjective
from nemo_eppo.algorithms.policy import explained_variance, truncated_importance_weights
from nemo_eppo.config import RunError
from nemo_eppo.data.datasets import PromptItem
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.megatron import device
from nemo_eppo.megatron.collectives import require_same
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.observability.timers import Timers
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.ledger import Ledger
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import Experience, FinishReason, RolloutBatch, minibatches, seeds_for, step_seed
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.ppo import PPOSettings
from nemo_eppo.training.critics import Critic
from nemo_eppo.training.policy import Policy, PolicyOutputs, ReferenceOutputs, next_token_targets
from nemo_eppo.training.reward_sources import RawRewards, RewardSources

CHECK_INTERVAL = 50
"""Steps between comparisons of engine and trainer where the old log-probs are the engine's."""


class EngineMismatchError(RunError):
    """The engine's log-probs differ from the trainer's: it samples from another distribution than is trained."""


class Rollout(NamedTuple):
    """Responses to prompts as tensors and as text; the same on every rank."""

    prompts: list[list[int]]
    """Token ids of each response's prompt."""
    batch: RolloutBatch
    samples: list[Sample]


@dataclass(frozen=True)
class StepResult:
    """Everything that one PPO step produced; the same on every rank."""

    metrics: dict[str, float]
    batch: RolloutBatch
    samples: list[Sample]
    experience: Experience
    ledger: Ledger
    latents: Tensor | None
    """Latents [B, D] from the reward models; None if no model has any."""


class PPO:
    """The algorithm over a policy, a critic and sources of reward. It has no state but the reward pipeline's.

    Args:
        critic: gives values; None for an estimator of advantages that needs none.
        sources: sources of the rewards that are trained on.
        observed: sources by name whose standardised rewards are only reported, as reward/<name>.
    """

    def __init__(
        self,
        settings: PPOSettings,
        pipeline: RewardPipeline,
        policy: Policy,
        critic: Critic | None,
        sources: RewardSources,
        observed: Mapping[str, RewardSources],
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        seed: int,
    ) -> None:
        self.settings, self.pipeline, self.policy, self.critic = settings, pipeline, policy, critic
        self.sources, self.observed = sources, observed
        self.sampling, self.tokenizer, self.seed = sampling, tokenizer, seed
        self.estimator = ESTIMATORS[settings.advantages.estimator](**settings.advantages.given)
        self.timers = Timers(device.synchronize)
        self._has_compared = False  # whether this process has compared the engine's log-probs with the trainer's
        self.updating = False
        """Whether the newest step has begun to change weights, which are then those of no whole step if it is lost."""

    def step(self, step: int, prompts: Sequence[PromptItem]) -> StepResult:
        """Generate responses, collect and shape their rewards, and update policy and critic.

        Args:
            step: number of the step, counted from 1; the random numbers depend on it.
            prompts: prompts of the global batch; each gets `samples_per_prompt` responses in neighbouring rows.

        Raises:
            ServerError: a server failed; only this step is lost.
            ServiceError: a colocated critic failed; only this step is lost.
            RewardFunctionError: a reward function failed; only this step is lost.
            EngineMismatchError: the engine's log-probs differ too much; the rollout was not trained on.
            RefitError: the engine did not receive all of the new weights.
            FloatingPointError, ValueError: a loss, reward or value is not finite; the message names it.
        """
        started = time.perf_counter()
        timers, settings = self.timers, self.settings
        self.updating = False
        with timers("refit"):
            self.policy.refit()
        prompts = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
        with timers("generate"):
            rollout = self.roll_out(prompts, self.sampling, step_seed(self.seed, step))
            generation_seconds, batch = time.perf_counter() - started, rollout.batch
            baselines = self._ask_baselines(prompts, batch)
            rewards, observed = self.ask(rollout)
        with timers("logprobs"):
            outputs, mismatch = self._old_outputs(batch, step)
        with timers("reference"):
            reference = self.policy.infer_reference(
                batch,
                rollout.prompts,
                logprobs="ref_logprobs" in self.pipeline.needs,
                energies="ref_energies" in self.pipeline.needs,
            )
        with timers("server_wait"):
            raw = rewards()
            observed_rewards = {f"reward/{name}": answer() for name, answer in observed.items()}
            values = baselines()
        with timers("shape"):
            experience, ledger = self._shape(step, rollout, outputs, reference, raw, values)
            ledger.observations |= observed_rewards
        metrics = self._train(step, batch, experience)
        with timers("shape"):
            if (kl := self.pipeline.kl).coefficient > 0:
                metrics["kl/coefficient"] = kl.coefficient
            if self._policy_learns(step) and "kl/policy_reference" in ledger.observations:
                kl.end_step(ledger.observations["kl/policy_reference"].mean().item(), batch.batch_size)
            metrics |= ledger.means() | mismatch | self._rollout_metrics(batch, outputs, experience, generation_seconds)
        metrics |= timers.collect(time.perf_counter() - started)
        return StepResult(metrics, batch, rollout.samples, experience, ledger, raw.latents)

    def roll_out(self, prompts: Sequence[PromptItem], sampling: SamplingParams, seed: int) -> Rollout:
        """Generate one response for each prompt; row i is sampled with seed number i derived from `seed`."""
        ids = [prompt.token_ids.tolist() for prompt in prompts]
        completions = self.policy.generate(ids, sampling, seeds_for(seed, torch.arange(len(ids))))
        texts = self.tokenizer.decode_batch([completion.token_ids for completion in completions])
        samples = [
            Sample(
                prompt=prompt.text,
                response=text,
                token_ids=tuple(completion.token_ids),
                finished=completion.finish_reason is FinishReason.STOP,
                fields=prompt.fields,
            )
            for prompt, completion, text in zip(prompts, completions, texts, strict=True)
        ]
        return Rollout(ids, RolloutBatch.from_completions(ids, completions, self.tokenizer.pad_id), samples)

    def ask(self, rollout: Rollout) -> tuple[Callable[[], RawRewards], dict[str, Callable[[], Tensor]]]:
        """Request rewards from all sources at once. The returned functions are collective and wait for the answers: one
        gives the raw rewards, and one for each observed name gives standardised rewards [B]."""

        def standardised(sources: RewardSources) -> Callable[[], Tensor]:
            wait = sources.ask(rollout.batch, rollout.samples)
            mean, std = torch.tensor([[column.mean, column.std] for column in sources.columns]).unbind(1)
            return lambda: ((wait().scores - mean) / std).double().mean(dim=1)

        rewards = self.sources.ask(rollout.batch, rollout.samples)
        return rewards, {name: standardised(sources) for name, sources in self.observed.items()}

    def _old_outputs(self, batch: RolloutBatch, step: int) -> tuple[PolicyOutputs, dict[str, float]]:
        """Return the outputs of the policy that generated the batch, and how far engine and trainer differ."""
        settings = self.settings
        if settings.old_logprobs == "engine" and self._has_compared and (step - 1) % CHECK_INTERVAL:
            return self.policy.read(batch), {}
        self._has_compared = True
        computed = self.policy.infer(batch)
        mismatch = engine_mismatch(batch, computed.logprobs, settings.mismatch_limit)
        return (self.policy.read(batch) if settings.old_logprobs == "engine" else computed), mismatch

    def _ask_baselines(self, prompts: Sequence[PromptItem], batch: RolloutBatch) -> Callable[[], Tensor | None]:
        """Start to compute the estimator's baselines, and put the engine to sleep. The returned function gives the
        critic's values [B, T or T + 1] or the proxy rewards of greedy responses [B, T]; None if neither is needed."""
        if self.estimator.needs != "greedy":
            self.policy.engine.sleep()
            if self.critic is None:
                return lambda: None
            return self.critic.values(batch, after_last=self.settings.advantages.bootstrap_truncated is True)
        distinct = {prompt.index: prompt for prompt in prompts}
        rollout = self.roll_out(list(distinct.values()), self.sampling.as_greedy, 0)
        self.policy.engine.sleep()
        answer = self.sources.ask(rollout.batch, rollout.samples)
        row_of = {index: row for row, index in enumerate(distinct)}
        rows = torch.tensor([row_of[prompt.index] for prompt in prompts])
        columns = self.sources.columns
        return lambda: self.pipeline.baseline(answer().scores, columns)[rows, None].expand(batch.mask.shape)

    def _shape(
        self,
        step: int,
        rollout: Rollout,
        outputs: PolicyOutputs,
        reference: ReferenceOutputs,
        raw: RawRewards,
        values: Tensor | None,
    ) -> tuple[Experience, Ledger]:
        """Compute rewards and advantages. `values` are the baselines of `_ask_baselines`."""
        settings, batch = self.settings, rollout.batch
        mask = batch.mask
        shaped = self.pipeline(
            RewardInputs(
                scores=raw.scores,
                columns=self.sources.columns,
                samples=rollout.samples,
                tokens=batch.tokens,
                prompt_lengths=batch.prompt_lengths,
                mask=mask,
                truncated=batch.truncated,
                logprobs=outputs.logprobs,
                energies=outputs.energies,
                ref_logprobs=reference.logprobs,
                ref_energies=reference.energies,
                latents=raw.latents,
                step=step,
                max_steps=settings.max_steps,
            )
        )
        if self.pipeline.config.terms:
            digest = hashlib.sha256(shaped.token_rewards.numpy().tobytes()).hexdigest()
            require_same("shaping.terms: the rewards that they shape", digest)
        groups = torch.arange(batch.batch_size) // settings.samples_per_prompt
        advantages, returns = self.estimator(shaped.token_rewards, values, mask, groups, batch.truncated)
        experience = Experience(
            mask=mask,
            logprobs=outputs.logprobs,
            ref_logprobs=reference.logprobs,
            values=None if values is None or self.critic is None else values[:, : mask.shape[1]],
            energies=outputs.energies,
            ref_energies=reference.energies,
            rewards=shaped.token_rewards,
            advantages=advantages,
            returns=returns,
        )
        experience.validate()
        return experience, shaped.ledger

    def _policy_learns(self, step: int) -> bool:
        return step > self.settings.critic_warmup_steps

    def _train(self, step: int, batch: RolloutBatch, experience: Experience) -> dict[str, float]:
        """Make all updates of a step. A critic server makes its updates in order while the policy makes its own."""
        settings, self.updating = self.settings, True
        reports: list[dict[str, float]] = []
        pending = []
        for epoch in range(settings.epochs):
            for rows in minibatches(batch.batch_size, settings.mini_batch_size, step_seed(self.seed, step), epoch):
                mini_batch, mini_experience = batch.select(rows), experience.select(rows)
                if self.critic is not None:
                    returns, values = mini_experience.returns, mini_experience.values
                    assert returns is not None
                    assert values is not None
                    with self.timers("critic_train"):
                        pending.append(self.critic.train(mini_batch, returns, values))
                report = {}
                if self._policy_learns(step):
                    with self.timers("actor_train"):
                        report = self._train_policy(mini_batch, mini_experience, is_first=not reports)
                reports.append({f"actor/{name}": value for name, value in report.items()})
        if self.critic is not None:
            with self.timers("critic_train"), self.critic.turn():
                for report, update in zip(reports, pending, strict=True):
                    report |= {f"critic/{name}": value for name, value in update().items()}
        return {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}

    def _train_policy(self, batch: RolloutBatch, experience: Experience, is_first: bool) -> dict[str, float]:
        """Make one update on a mini-batch; return its metrics."""
        settings, shaping, mask = self.settings, self.pipeline.config, experience.mask
        rows: Rows = {
            "tokens": batch.tokens,
            "lengths": batch.lengths,
            "targets": next_token_targets(batch.tokens, mask),
            "mask": mask,
            "old_logprobs": experience.logprobs,
            "advantages": experience.advantages,
        }
        if settings.importance_cap is not None:
            rows["weights"] = truncated_importance_weights(
                experience.logprobs, batch.engine_logprobs, mask, settings.importance_cap
            )
        divergence: Literal["none", "kl", "chi2"] = "none"
        if shaping.divergence.in_loss:
            divergence = "kl" if shaping.divergence.kind == "kl" else "chi2"
        objective = PolicyObjective(
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            aggregation=settings.aggregation,
            entropy_coefficient=settings.entropy_coefficient,
            kl_coefficient=self.pipeline.kl.loss_coefficient,
            kl_estimator=shaping.kl.estimator,
            divergence=divergence,
            divergence_weight=self._divergence_weight(batch, experience, is_first),
            tokens=float(mask.sum()),
            sequences=batch.batch_size,
            longest=self.sampling.max_new_tokens,
        )
        if objective.kl_coefficient or divergence != "none":
            assert experience.ref_logprobs is not None
            rows["ref_logprobs"] = experience.ref_logprobs

        def loss_function(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            return objective(output[:, :-1, 0], output[:, :-1, 1], rows)

        return self.policy.runner.train_step(rows, loss_function)

    def _divergence_weight(self, batch: RolloutBatch, experience: Experience, is_first: bool) -> float:
        """Return the weight of a response's divergence in the loss, equal in all micro-batches; 0 if the loss has none.

        sqrt_chi2 needs chi2 of the whole mini-batch under the weights that are about to be updated. It is known at the
        first update of a step; every later update needs one more forward pass.
        """
        config = self.pipeline.config.divergence
        if not config.in_loss:
            return 0.0
        assert experience.ref_logprobs is not None
        logprobs = experience.logprobs
        if config.kind == "sqrt_chi2" and not is_first:
            logprobs = self.policy.infer(batch, energies=False).logprobs
        chi2 = sequence_divergence(logprobs.double(), experience.ref_logprobs.double(), experience.mask).chi2.mean()
        return config.coefficient * divergence_slope(chi2.item(), config.kind)

    def _rollout_metrics(
        self, batch: RolloutBatch, outputs: PolicyOutputs, experience: Experience, seconds: float
    ) -> dict[str, float]:
        mask = batch.mask
        metrics = {
            "rollout/response_length": float(mask.sum()) / batch.batch_size,
            "rollout/truncated_fraction": float(batch.truncated.float().mean()),
            "rollout/tokens_per_second": float(mask.sum()) / seconds,
            "rollout/entropy": float(masked_mean(outputs.entropies, mask)),
        }
        if experience.values is not None and experience.returns is not None:
            variance = explained_variance(experience.values, experience.returns, mask)
            metrics["critic/explained_variance"] = float(variance)
        return metrics


def engine_mismatch(batch: RolloutBatch, logprobs: Tensor, limit: float | None) -> dict[str, float]:
    """Return mean, maximum and quantiles of |logp_engine - logp_trainer| over the response tokens, in nats.

    Args:
        logprobs: [B, T] log-probs of the trainer under the same weights.
        limit: largest mean that is allowed; None for no limit.

    Raises:
        EngineMismatchError: the mean is above the limit.
    """
    errors = (logprobs - batch.engine_logprobs).abs()[batch.mask]
    mismatch = {"mean": float(errors.mean()), "max": float(errors.max())}
    for percent in (50, 90, 99):
        mismatch[f"p{percent}"] = float(errors.kthvalue((len(errors) - 1) * percent // 100 + 1).values)
    if limit is not None and not mismatch["mean"] <= limit:  # also where the mean is NaN
        text = ", ".join(f"{name} {value:.3g}" for name, value in mismatch.items())
        raise EngineMismatchError(
            f"|logp_engine - logp_trainer| per token: {text}; the mean is above ppo.mismatch_limit = {limit:g}. The "
            "engine computes with other weights, or in another precision, than the trainer; or it is TensorRT-LLM, "
            "whose log-probs are those before generation.top_k and top_p"
        )
    return {f"rollout/engine_mismatch_{name}": value for name, value in mismatch.items()}
