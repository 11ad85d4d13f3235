"""Ensembles against numpy, and the numbers of models that cannot be combined."""

from typing import Any

import numpy as np
import pytest
import torch

from nemo_eppo.algorithms.ensembles import combine_scores

SCORES = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"how": "mean"}, SCORES.numpy().mean(1)),
        ({"how": "wco"}, SCORES.numpy().min(1)),
        ({"how": "uwo", "uwo_lambda": 0.5}, SCORES.numpy().mean(1) - 0.5 * SCORES.numpy().var(1)),
        ({"how": "uwo", "uwo_lambda": 0.1, "ddof": 1}, SCORES.numpy().mean(1) - 0.1 * SCORES.numpy().var(1, ddof=1)),
    ],
)
def test_ensembles_are_those_of_numpy(settings: dict[str, Any], expected: np.ndarray) -> None:
    np.testing.assert_allclose(combine_scores(SCORES, **settings).numpy(), expected, rtol=1e-12)


def test_a_single_model_is_itself() -> None:
    assert torch.equal(combine_scores(SCORES[:, :1], "single"), SCORES[:, 0])
    assert torch.equal(combine_scores(SCORES[:, :1], "mean"), SCORES[:, 0])


@pytest.mark.parametrize(("models", "how"), [(2, "single"), (1, "wco"), (1, "uwo")])
def test_numbers_of_models_that_make_no_sense_are_refused(models: int, how: Any) -> None:
    with pytest.raises(ValueError, match=f"{models} reward models?, but combine is '{how}'"):
        combine_scores(SCORES[:, :models], how)


def test_the_gradient_of_the_variance_penalty() -> None:
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: combine_scores(x, "uwo", 0.3, 1), scores)
