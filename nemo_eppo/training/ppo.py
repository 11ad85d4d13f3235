"""PPO with the energy-loss penalty, the actor's side: one step from prompts to updated policy and critic.

Per-token tensors are [B, T] over the *global* rollout batch and equal on every rank (README, "How it is computed"): all
that is decided per step, from rewards to advantages to the order of mini-batches, is computed by every rank alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_eppo.algorithms.advantages import gae
from nemo_eppo.algorithms.divergences import divergence_slope, kl_estimate, sequence_divergence
from nemo_eppo.algorithms.masking import masked_mean, whiten
from nemo_eppo.algorithms.policy import aggregate, explained_variance, policy_loss, truncated_importance_weights
from nemo_eppo.megatron import device
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.observability.timers import Timers
from nemo_eppo.rewards.ledger import Ledger
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.terms import RewardInputs
from nemo_eppo.rollout.batch import Completion, Experience, RolloutBatch, minibatches, seeds_for, step_seed
from nemo_eppo.rollout.sampling import SamplingParams
from nemo_eppo.training.policy import Policy, Scores, next_token_targets
from nemo_eppo.training.ppo_config import PPOSettings
from nemo_eppo.training.remote import Answers, RemoteModels

GoldReward = Callable[[str, str, bool], float]


class EngineMismatchError(RuntimeError):
    """The engine's log-probs are not the trainer's: it samples from another distribution than is trained."""


@dataclass(frozen=True)
class StepResult:
    """All that one PPO step made; the same on every rank."""

    metrics: dict[str, float]
    batch: RolloutBatch
    completions: list[Completion]
    experience: Experience
    ledger: Ledger
    latents: Tensor | None
    """[B, D] of the reward models."""


class PPO:
    """The algorithm over a policy and remote models. It keeps no state of its own but the reward pipeline's."""

    def __init__(
        self,
        settings: PPOSettings,
        pipeline: RewardPipeline,
        policy: Policy,
        remote: RemoteModels,
        sampling: SamplingParams,
        pad_id: int,
        seed: int,
    ) -> None:
        self.settings, self.pipeline, self.policy, self.remote = settings, pipeline, policy, remote
        self.sampling, self.pad_id, self.seed = sampling, pad_id, seed
        self.timers = Timers(device.synchronize)

    def step(self, step: int, prompts: list[list[int]]) -> StepResult:
        """Roll out, score, shape, and update policy and critic.

        Args:
            step: 1 for the first; decides the random numbers.
            prompts: token ids of the global batch.

        Raises:
            ServerError: a server failed; nothing of this step is lost but the step itself.
            EngineMismatchError: nothing was trained on.
            RefitError: the engine did not get the new weights whole.
            FloatingPointError, ValueError: a loss, reward or value that is not finite, named.
        """
        started = time.perf_counter()
        timers, settings = self.timers, self.settings
        with timers("generate"):
            seeds = seeds_for(step_seed(self.seed, step), torch.arange(len(prompts)))
            completions = self.policy.generate(prompts, self.sampling, seeds)
            self.policy.engine.sleep()
            batch = RolloutBatch.from_completions(prompts, completions, self.pad_id)
            pending = self.remote.ask(batch, bootstrap=settings.bootstrap_truncated)
        generated = time.perf_counter() - started
        with timers("logprobs"):
            scores = self.policy.score(batch)
            mismatch = engine_mismatch(batch, scores.logprobs, settings.mismatch_limit)
        with timers("reference"):
            reference = self.policy.score_reference(batch)
        with timers("server_wait"):
            answers = self.remote.collect(pending)
        with timers("shape"):
            experience, ledger, kl_in_loss = self._shape(step, batch, scores, reference, answers)
        metrics = self._train(step, batch, experience, kl_in_loss)
        with timers("refit"):
            self.policy.refit()
        with timers("shape"):
            metrics |= ledger.means() | mismatch | self._rollout_metrics(batch, scores, experience, generated)
        metrics |= timers.collect(time.perf_counter() - started)
        return StepResult(metrics, batch, completions, experience, ledger, answers.latents)

    def _shape(
        self, step: int, batch: RolloutBatch, scores: Scores, reference: Scores, answers: Answers
    ) -> tuple[Experience, Ledger, float]:
        settings, mask, values = self.settings, batch.mask, answers.values
        assert values is not None
        shaped = self.pipeline(
            RewardInputs(
                scores=answers.scores,
                score_mean=self.remote.statistics.mean,
                score_std=self.remote.statistics.std,
                mask=mask,
                truncated=batch.truncated,
                policy_energy=scores.energies,
                reference_energy=reference.energies,
                logprobs=scores.logprobs,
                ref_logprobs=reference.logprobs,
                latents=answers.latents,
                step=step,
                max_steps=settings.max_steps,
            )
        )
        after_last = None
        if settings.bootstrap_truncated:
            after_last = values.gather(1, (batch.lengths - 1).unsqueeze(1)).squeeze(1)
            values = values[:, :-1]
        advantages, returns = gae(
            shaped.token_rewards,
            values,
            mask,
            settings.gamma,
            settings.lam,
            bootstrap_truncated=settings.bootstrap_truncated,
            truncated=batch.truncated,
            bootstrap_values=after_last,
        )
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask)
        experience = Experience(
            mask=mask,
            logprobs=scores.logprobs,
            ref_logprobs=reference.logprobs,
            values=values,
            energies=scores.energies,
            ref_energies=reference.energies,
            rewards=shaped.token_rewards,
            advantages=advantages,
            returns=returns,
        )
        experience.validate()
        return experience, shaped.ledger, shaped.kl_loss_coefficient

    def _train(self, step: int, batch: RolloutBatch, experience: Experience, kl_in_loss: float) -> dict[str, float]:
        """All updates of a step. The critic's run on its server, one after the other, while the policy's run here."""
        settings = self.settings
        reports: list[dict[str, float]] = []
        pending = []
        for epoch in range(settings.epochs):
            for rows in minibatches(batch.batch_size, settings.mini_batch_size, step_seed(self.seed, step), epoch):
                with self.timers("critic_train"):
                    part, chosen = batch.select(rows), experience.select(rows)
                    pending.append(self.remote.train(part, chosen.returns, chosen.values))
                with self.timers("actor_train"):
                    actor = self._train_policy(part, chosen, kl_in_loss, is_first=len(pending) == 1)
                reports.append({f"actor/{name}": value for name, value in actor.items()})
        with self.timers("critic_train"):
            for report, update in zip(reports, pending, strict=True):
                report |= {f"critic/{name}": value for name, value in self.remote.finish(update).items()}
        return {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}

    def _train_policy(
        self, batch: RolloutBatch, experience: Experience, kl_in_loss: float, is_first: bool
    ) -> dict[str, float]:
        settings, mask = self.settings, experience.mask
        tokens = float(mask.sum())
        denominator = tokens if settings.aggregation == "token" else float(batch.batch_size)
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
        slope = self._divergence_slope(batch, experience, is_first)
        if kl_in_loss or slope is not None:
            assert experience.ref_logprobs is not None
            rows["ref_logprobs"] = experience.ref_logprobs

        def loss_function(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropies, mask = output[:, :-1, 0], output[:, :-1, 1], rows["mask"]
            loss, stats = policy_loss(
                logprobs,
                rows["old_logprobs"],
                rows["advantages"],
                mask,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                dual_clip=settings.dual_clip,
                aggregation=settings.aggregation,
                denominator=denominator,
                importance_weights=rows.get("weights"),
            )
            report = {
                "clip_fraction": stats.clipped / tokens,
                "approx_kl": stats.approx_kl / tokens,
                "ratio_mean": stats.ratio / tokens,
                "entropy": aggregate(entropies.detach(), mask, "token", tokens),
            }
            if settings.entropy_coefficient:
                bonus = aggregate(entropies, mask, settings.aggregation, denominator)
                loss = loss - settings.entropy_coefficient * bonus
            if kl_in_loss:
                kl = kl_estimate(logprobs, rows["ref_logprobs"], mask, settings.kl.estimator)
                penalty = kl_in_loss * aggregate(kl, mask, settings.aggregation, denominator)
                loss, report["kl_loss"] = loss + penalty, penalty.detach()
            if slope is not None:
                found = sequence_divergence(logprobs, rows["ref_logprobs"], mask)
                penalty = slope * (found.kl if settings.divergence.kind == "kl" else found.chi2).sum()
                penalty = penalty / batch.batch_size
                loss, report["divergence_loss"] = loss + penalty, penalty.detach()
            return loss, report

        return self.policy.runner.train_step(rows, loss_function)

    def _divergence_slope(self, batch: RolloutBatch, experience: Experience, is_first: bool) -> float | None:
        """The weight of each response's divergence in the loss, the same in every micro-batch; None if it has none.

        sqrt_chi2 needs chi2 of the whole mini-batch under the weights that are about to be updated: known in the first
        update of a step, else one more forward pass.
        """
        config = self.settings.divergence
        if config.kind == "none" or config.placement == "reward":
            return None
        assert experience.ref_logprobs is not None
        logprobs = experience.logprobs
        if config.kind == "sqrt_chi2" and not is_first:
            logprobs = self.policy.score(batch, energies=False).logprobs
        chi2 = sequence_divergence(logprobs.double(), experience.ref_logprobs.double(), experience.mask).chi2.mean()
        return config.coefficient * divergence_slope(chi2.item(), config.kind)

    def _rollout_metrics(
        self, batch: RolloutBatch, scores: Scores, experience: Experience, seconds: float
    ) -> dict[str, float]:
        mask = batch.mask
        return {
            "rollout/response_length": float(mask.sum()) / batch.batch_size,
            "rollout/truncated_fraction": float(batch.truncated.float().mean()),
            "rollout/tokens_per_second": float(mask.sum()) / seconds,
            "rollout/entropy": float(masked_mean(scores.entropies, mask)),
            "critic/explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
        }


def engine_mismatch(batch: RolloutBatch, logprobs: Tensor, limit: float | None) -> dict[str, float]:
    """Metrics of |logp_engine - logp_trainer| over the response tokens: mean, maximum and quantiles.

    Args:
        logprobs: [B, T], the trainer's, of the same weights.
        limit: of the mean; None for none.

    Raises:
        EngineMismatchError: the mean is above the limit.
    """
    sizes = (logprobs - batch.engine_logprobs).abs()[batch.mask].sort().values
    found = {"mean": float(sizes.mean()), "max": float(sizes[-1])}
    for percent in (50, 90, 99):
        found[f"p{percent}"] = float(sizes[(len(sizes) - 1) * percent // 100])
    if limit is not None and not found["mean"] <= limit:
        text = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        raise EngineMismatchError(
            f"|logp_engine - logp_trainer| per token: {text}; the mean is above ppo.mismatch_limit = {limit:g}. The "
            "engine computes with other weights, or with another precision or filter, than the trainer"
        )
    return {f"rollout/engine_mismatch_{name}": value for name, value in found.items()}
