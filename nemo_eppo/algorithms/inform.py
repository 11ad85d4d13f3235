"""The information bottleneck of a reward model (InfoRM, Miao et al., NeurIPS 2024, arXiv 2402.09345)."""

from torch import Tensor

from nemo_eppo.algorithms.choices import KLMode


def latent_kl(mean: Tensor, logvar: Tensor, mode: KLMode) -> Tensor:
    """Return the KL penalty [B] of each response's latent distribution N(mean, exp(logvar)), in nats.

    Args:
        mean: [B, d].
        logvar: [B, d], the logarithm of the variance.
        mode: `paper_sum`: KL(N(mean, exp(logvar)) || N(0, I)) = sum over d of `(exp(v) + m^2 - 1 - v) / 2`;
            `official_mean_first`, the authors' code: the same expression for the *averages* of m and v over d. It does
            not see latents that average out, and is smaller by a factor of d or more.
    """
    if mode == "official_mean_first":
        mean, logvar = mean.mean(dim=1, keepdim=True), logvar.mean(dim=1, keepdim=True)
    return (logvar.exp() + mean.square() - 1 - logvar).sum(dim=1) / 2
