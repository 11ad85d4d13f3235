"""How several reward models become one reward (Coste et al. 2023, Reward Model Ensembles, arXiv 2310.02743)."""

from torch import Tensor

from nemo_eppo.algorithms.choices import Combine


def combine_scores(scores: Tensor, how: Combine, uwo_lambda: float = 0.1, ddof: int = 0) -> Tensor:
    """Combine the scores of k reward models into one reward [B].

    Args:
        scores: [B, k], standardised.
        how: `single` takes the only one; `sum`; `mean`; `wco` takes the lowest (worst-case optimisation); `uwo` takes
            the mean less `uwo_lambda` times the variance over models (uncertainty-weighted optimisation).
        uwo_lambda: weight of the variance (authors: 0.1 for PPO, 0.5 for best-of-n).
        ddof: 0 for the population variance, 1 for the sample variance, as in the authors' PPO code.

    Raises:
        ValueError: `how` cannot combine k models; see `check_models`.
    """
    check_models(scores.shape[1], how)
    if how == "wco":
        return scores.amin(dim=1)
    if how == "sum":
        return scores.sum(dim=1)
    mean = scores.mean(dim=1)
    return mean - uwo_lambda * scores.var(dim=1, correction=ddof) if how == "uwo" else mean


def check_models(models: int, how: Combine) -> None:
    """ValueError unless `models` reward models can be combined in this way."""
    if how == "single" and models != 1:
        others = "sum, mean, wco or uwo"
        raise ValueError(f"scores: {models} reward models, but combine is 'single'; expected 1, or {others}")
    if how in ("wco", "uwo") and models < 2:
        raise ValueError(f"scores: {models} reward model, but combine is {how!r}; expected at least 2")
