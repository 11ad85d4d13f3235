"""The loss of the policy, with every term in one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nemo_eppo.algorithms.choices import Aggregation, KLEstimator
from nemo_eppo.algorithms.divergences import kl_estimate, sequence_divergence
from nemo_eppo.algorithms.policy import aggregate, policy_loss


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """The loss of one update's mini-batch: `surrogate - c_H * entropy + c_KL * KL + w * divergence`.

    It is called on each micro-batch of each data-parallel rank, [B, T] with any B and any padding. All denominators
    belong to the *global* mini-batch, so the losses, and the reports, of its parts add up to its own.
    """

    clip_low: float
    """The probability ratio is clipped below `1 - clip_low` (Schulman et al. 2017, arXiv 1707.06347)."""
    clip_high: float
    """The probability ratio is clipped above `1 + clip_high`."""
    dual_clip: float | None = None
    """Bound of the surrogate for negative advantages, above 1 (arXiv 1912.09729); None: no bound."""
    aggregation: Aggregation = "token"
    """How surrogate, entropy and KL are averaged, see `aggregate`; a divergence is a mean over responses."""
    entropy_coefficient: float = 0.0
    """c_H, the weight of the entropy bonus; 0: no bonus."""
    kl_coefficient: float = 0.0
    """c_KL, the weight of the KL estimate per token; 0: no such term."""
    kl_estimator: KLEstimator = "k1"
    """How KL(policy || reference) is estimated, see `kl_estimate`."""
    divergence: Literal["none", "kl", "chi2"] = "none"
    """Which divergence of whole responses is penalised, see `sequence_divergence`."""
    divergence_weight: float = 0.0
    """w: coefficient times `divergence_slope`, by which "chi2" becomes a penalty on the square root of chi2."""
    tokens: float
    """Number of response tokens in the global mini-batch."""
    sequences: int
    """Number of responses in the global mini-batch."""
    longest: int
    """Most tokens that a response may have (`max_new_tokens`); used by aggregation "fixed"."""

    def __post_init__(self) -> None:
        if self.divergence not in ("none", "kl", "chi2"):
            raise ValueError(f"divergence: {self.divergence!r}; expected 'none', 'kl' or 'chi2'")

    def __call__(
        self, logprobs: Tensor, entropies: Tensor, rows: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the loss, and of its report.

        Args:
            logprobs: [B, T] of the policy being trained, with gradient.
            entropies: [B, T] in nats, with gradient if there is an entropy bonus.
            rows: `mask` bool [B, T]; `old_logprobs` [B, T] before this step's updates; `advantages` [B, T];
                `weights` [B, T] of `truncated_importance_weights`, if sampling is corrected;
                `ref_logprobs` [B, T], if there is a KL term or a divergence.

        Returns:
            scalar with gradient, and detached scalars: `clip_fraction`, `approx_kl` (k3, old policy || policy),
            `ratio_mean` and `entropy`, which are means over tokens; `kl_loss` and `divergence_loss` if the loss has
            such a term, weighted as there.
        """
        mask = rows["mask"]
        sequences = float(self.sequences)
        denominators = {"token": self.tokens, "sequence": sequences, "fixed": sequences * self.longest}
        denominator = denominators[self.aggregation]
        loss, stats = policy_loss(
            logprobs,
            rows["old_logprobs"],
            rows["advantages"],
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            aggregation=self.aggregation,
            denominator=denominator,
            importance_weights=rows.get("weights"),
        )
        report = {
            "clip_fraction": stats.clipped / self.tokens,
            "approx_kl": stats.approx_kl / self.tokens,
            "ratio_mean": stats.ratio / self.tokens,
            "entropy": aggregate(entropies.detach(), mask, "token", self.tokens),
        }
        if self.entropy_coefficient:
            loss = loss - self.entropy_coefficient * aggregate(entropies, mask, self.aggregation, denominator)
        if self.kl_coefficient:
            kl = kl_estimate(logprobs, rows["ref_logprobs"], mask, self.kl_estimator)
            penalty = self.kl_coefficient * aggregate(kl, mask, self.aggregation, denominator)
            loss, report["kl_loss"] = loss + penalty, penalty.detach()
        if self.divergence != "none":
            estimates = sequence_divergence(logprobs, rows["ref_logprobs"], mask)
            per_response = estimates.kl if self.divergence == "kl" else estimates.chi2
            penalty = self.divergence_weight * per_response.sum() / self.sequences
            loss, report["divergence_loss"] = loss + penalty, penalty.detach()
        return loss, report
