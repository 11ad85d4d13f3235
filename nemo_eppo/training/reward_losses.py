"""The losses of a reward model: Bradley-Terry alone, with ODIN's length head, or with InfoRM's bottleneck.

Row 2i is the chosen response of pair i, row 2i + 1 the rejected one. The loss of a micro-batch is a sum over its rows;
these sums add up to the loss of the global batch.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.algorithms.inform import KLMode, latent_kl
from nemo_eppo.algorithms.odin import length_slopes
from nemo_eppo.algorithms.preference import ScoreReduction, bradley_terry_loss, sequence_score
from nemo_eppo.algorithms.sampling import counter_hash
from nemo_eppo.config import Config
from nemo_eppo.megatron.heads import ScalarHeads, outputs_per_token
from nemo_eppo.megatron.runner import ModelRunner, Rows


class OdinConfig(Config):
    """Disentangling reward from length (ODIN, arXiv 2402.07319)."""

    length_weight: float = Field(1.0, ge=0)
    """Weight of |rho(quality, length)| - rho(length head, length); rho: Pearson correlation over the global batch."""
    orthogonality_weight: float = Field(1.0, ge=0)
    """Weight of the absolute cosine of the two heads' weights."""


class InformConfig(Config):
    """The information bottleneck (InfoRM, arXiv 2402.09345)."""

    latent_size: int = Field(128, ge=1)
    """Size d of the latents; the authors' scripts have 512."""
    beta: float = Field(0.1, ge=0)
    """Weight of the latents' KL divergence, summed over both sides of a pair."""
    kl: KLMode = "paper_sum"
    """`paper_sum` sums over d; `official_mean_first` (the authors' code) averages over d first and is far smaller."""
    sft_responses: Path | None = None
    """File of rows {"prompt", "response"} of the SFT model (or its training data), of which the first 2048 are used. A
    Gaussian of their latents is stored with the model. Kind `inform` needs it; null for other kinds."""


class RewardLossConfig(Config):
    """The loss, and how a response gets its score."""

    kind: Literal["bradley_terry", "odin", "inform"] = "bradley_terry"
    """`odin` adds a head that learns length, `inform` an information bottleneck that gives latents."""
    score: ScoreReduction = "last"
    """Which of the head's outputs is a response's score: that at its last token, or the sum or mean over its tokens."""
    margin: float = Field(0.0, ge=0)
    """Margin by which the chosen response's score should exceed the rejected one's; 0 for none."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed probability that a label is wrong; 0 for no smoothing."""
    l2: float = Field(0.0, ge=0)
    """Weight of the squared scores, which keeps scores near zero; 0 for none."""
    odin: OdinConfig = OdinConfig()
    inform: InformConfig = InformConfig()

    @model_validator(mode="after")
    def _inform_is_complete(self) -> "RewardLossConfig":
        if self.kind == "inform" and (self.score != "last" or self.inform.sft_responses is None):
            raise ValueError("kind 'inform' needs score 'last' and inform.sft_responses")
        return self


class BradleyTerry:
    """The loss `-log sigmoid(r_w - r_l - margin)` of the chosen response's score r_w and the rejected one's r_l."""

    head: ScalarHeads = "scalar"
    latent_size = 0

    def __init__(self, config: RewardLossConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    @property
    def outputs(self) -> int:
        """Number of values per token that the model gives."""
        return outputs_per_token(self.head, self.latent_size)

    def prepare(self, rows: Rows, runner: ModelRunner, step: int) -> Rows:
        """Add to the rows of the global batch what the loss needs to know about the whole batch."""
        return rows

    def __call__(self, output: Tensor, rows: Rows, pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch and its metrics.

        Args:
            output: [b, s, outputs] output of the heads.
            pairs: number of pairs in the global batch.
        """
        scores = self.score(output[..., 0], rows)
        return self.bradley_terry(scores, pairs), {"accuracy": (scores[0::2] > scores[1::2]).sum() / pairs}

    def score(self, token_scores: Tensor, rows: Rows) -> Tensor:
        """Reduce token scores [b, s] to scores [b] of responses."""
        return sequence_score(token_scores, rows["prompt_lengths"], rows["lengths"], self.config.score)

    def bradley_terry(self, scores: Tensor, pairs: float) -> Tensor:
        """Return the loss of n pairs with the scores [2n]."""
        config = self.config
        return bradley_terry_loss(
            scores[0::2],
            scores[1::2],
            margin=config.margin,
            label_smoothing=config.label_smoothing,
            l2=config.l2,
            denominator=pairs,
        )


class Odin(BradleyTerry):
    """Bradley-Terry loss of quality + length score, plus ODIN's length and orthogonality losses.

    Correlations over the global batch need one more forward pass before the update. It gives all scores, and from them
    each row's slope (`algorithms/odin.py`): exact without dropout, which this pass leaves out, else approximate.
    """

    head: ScalarHeads = "odin"

    def prepare(self, rows: Rows, runner: ModelRunner, step: int) -> Rows:
        def both(output: Tensor, rows: Rows) -> Tensor:
            return torch.stack([self.score(output[..., head], rows) for head in (0, 1)], dim=1)

        quality, length_scores = runner.infer_rows(rows, both, outputs=2).T.contiguous()
        slopes = length_slopes(quality, length_scores, rows["lengths"] - rows["prompt_lengths"])
        return rows | {"quality_slopes": slopes[0], "length_slopes": slopes[1]}

    def __call__(self, output: Tensor, rows: Rows, pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        quality, length_scores = (self.score(output[..., head], rows) for head in (0, 1))
        length = (rows["quality_slopes"] * quality + rows["length_slopes"] * length_scores).sum()
        # every token of every row holds the heads' cosine: one token per row is taken, so that the mean is the cosine
        orthogonality = output[:, 0, 2].abs().sum() / (2 * pairs)
        loss = self.bradley_terry(quality + length_scores, pairs)
        loss = loss + self.config.odin.length_weight * length + self.config.odin.orthogonality_weight * orthogonality
        return loss, {
            "accuracy": (quality[0::2] > quality[1::2]).sum() / pairs,
            "head_cosine": orthogonality.detach(),
        }


class Inform(BradleyTerry):
    """Bradley-Terry loss of a sampled latent's score, plus `beta` times the latents' KL divergence from N(0, I)."""

    head: ScalarHeads = "inform"

    def __init__(self, config: RewardLossConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.latent_size = config.inform.latent_size

    def prepare(self, rows: Rows, runner: ModelRunner, step: int) -> Rows:
        stream = counter_hash(torch.tensor(self.seed), torch.tensor(step))
        return rows | {"seeds": counter_hash(stream, torch.arange(len(rows["tokens"])))}

    def __call__(self, output: Tensor, rows: Rows, pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, report = super().__call__(output, rows, pairs)
        at_last = output[torch.arange(len(output), device=output.device), rows["lengths"] - 1]
        mean, logvar = at_last[:, 1:].chunk(2, dim=1)
        kl = latent_kl(mean, logvar, self.config.inform.kl).sum() / pairs
        return loss + self.config.inform.beta * kl, {**report, "latent_kl": kl.detach()}


LOSSES: dict[str, type[BradleyTerry]] = {"bradley_terry": BradleyTerry, "odin": Odin, "inform": Inform}
