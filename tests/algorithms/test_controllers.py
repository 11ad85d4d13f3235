"""KL controllers."""

import pytest

from nemo_eppo.algorithms.controllers import AdaptiveKLController, FixedCoefficient


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedCoefficient(0.1)
    controller.update(100.0, 64)
    controller.load_state_dict({**controller.state_dict()})
    assert controller.value == 0.1


@pytest.mark.parametrize(("kl", "error"), [(6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2)])
def test_the_adaptive_controller_moves_by_a_clipped_relative_error(kl: float, error: float) -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    controller.update(kl, n=50)
    assert controller.value == pytest.approx(0.2 * (1 + error * 50 / 1000))


def test_the_adaptive_controller_resumes_where_it_was() -> None:
    controller, resumed = (AdaptiveKLController(0.2, target=6.0, horizon=1000) for _ in range(2))
    controller.update(60.0, n=50)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value != 0.2


def test_settings_must_be_positive() -> None:
    with pytest.raises(ValueError, match="target: 0"):
        AdaptiveKLController(0.2, target=0, horizon=10)
