"""The losses of a reward model: Bradley-Terry alone, with ODIN's length head, or with InfoRM's bottleneck.

Row 2i is the chosen response of pair i, row 2i + 1 the rejected one. The loss of a micro-batch is a sum over its rows;
these sums add up to the loss of the global batch.
"""

import torch
from torch import Tensor

from nemo_eppo.algorithms.inform import latent_kl
from nemo_eppo.algorithms.odin import length_loss, length_slopes
from nemo_eppo.algorithms.preference import bradley_terry_loss, sequence_score
from nemo_eppo.algorithms.sampling import counter_hash
from nemo_eppo.megatron.heads import ScalarHeads
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.settings.reward_model import RewardLossConfig


class BradleyTerry:
    """The loss `-log sigmoid(r_w - r_l - margin)` of the chosen response's score r_w and the rejected one's r_l."""

    head: ScalarHeads = "scalar"
    latent_size = 0

    def __init__(self, config: RewardLossConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def prepare(self, rows: Rows, runner: ModelRunner, step: int) -> Rows:
        """Add to `rows` tensors that the loss needs of the whole global batch; collective."""
        return rows

    def __call__(self, output: Tensor, rows: Rows, pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch and its metrics.

        Args:
            output: [b, s, n] output of the head, n numbers per token.
            pairs: number of pairs in the global batch.
        """
        scores = self.score(output[..., 0], rows)
        return self.bradley_terry(scores, pairs), {"accuracy": self.accuracy(scores, pairs)}

    def score(self, token_scores: Tensor, rows: Rows) -> Tensor:
        """Reduce token scores [b, s] to scores [b] of responses."""
        return sequence_score(token_scores, rows["prompt_lengths"], rows["lengths"], self.config.score)

    def accuracy(self, scores: Tensor, pairs: float) -> Tensor:
        """Return this micro-batch's share of the pairs that the scores [2n] rank rightly; a tie counts half."""
        return ((1 + (scores[0::2] - scores[1::2]).detach().sign()) / 2).sum() / pairs

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
        lengths = rows["lengths"] - rows["prompt_lengths"]
        slopes = length_slopes(quality, length_scores, lengths)
        value = length_loss(quality, length_scores, lengths).repeat(len(quality))
        return rows | {"quality_slopes": slopes[0], "length_slopes": slopes[1], "length_loss": value}

    def __call__(self, output: Tensor, rows: Rows, pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        quality, length_scores = (self.score(output[..., head], rows) for head in (0, 1))
        length = (rows["quality_slopes"] * quality + rows["length_slopes"] * length_scores).sum()
        value = rows["length_loss"].sum() / (2 * pairs)
        length = length - length.detach() + value  # the slopes have the gradient alone
        # every token of every row holds the heads' cosine: one token per row is taken, so that the mean is the cosine
        orthogonality = output[:, 0, 2].abs().sum() / (2 * pairs)
        loss = self.bradley_terry(quality + length_scores, pairs)
        loss = loss + self.config.odin.length_weight * length + self.config.odin.orthogonality_weight * orthogonality
        return loss, {
            "accuracy": self.accuracy(quality, pairs),
            "length_loss": value,
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
