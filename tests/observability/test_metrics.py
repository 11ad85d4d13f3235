"""metrics.jsonl and TensorBoard."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_eppo.config import ConfigError
from nemo_eppo.observability.metrics import MetricsLogger, read_metrics


def _scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path, tensorboard=False)
    metrics.log(1, {"actor/loss": 0.5, "reward/final": 2})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("time") > 1.7e9
    assert row == {"step": 1, "actor/loss": 0.5, "reward/final": 2.0}
    metrics.close()


def test_curves_may_have_different_steps(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        metrics.log(0, {"validation/proxy_reward": 1.0})
        metrics.log(1, {"actor/loss": 0.5})
        metrics.log(2, {"actor/loss": 0.25, "validation/proxy_reward": 3.0})
    assert read_metrics(metrics.path) == {
        "validation/proxy_reward": ([0, 2], [1.0, 3.0]),
        "actor/loss": ([1, 2], [0.5, 0.25]),
    }


def test_tensorboard_shows_the_same_values(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"kl/policy_reference": step / 8})
    assert _scalars(tmp_path, "kl/policy_reference") == [(1, 0.125), (2, 0.25), (3, 0.375)]


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.log(step, {"loss": float(step)})
    with MetricsLogger(tmp_path, resume_step=3) as metrics:  # died after step 5, its checkpoint is of step 3
        for step in (4, 5, 6):
            metrics.log(step, {"loss": 10.0 * step})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert list(zip(*read_metrics(metrics.path)["loss"], strict=True)) == expected
    assert _scalars(tmp_path, "loss") == expected


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        metrics.log(0, {"loss": 1.0})
    MetricsLogger(tmp_path, tensorboard=False).close()
    assert read_metrics(metrics.path) == {}


def test_a_row_that_a_killed_process_did_not_finish_is_dropped(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        metrics.log(1, {"loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(metrics.path) == {"loss": ([1], [1.0])}
    with MetricsLogger(tmp_path, resume_step=1, tensorboard=False) as metrics:
        metrics.log(2, {"loss": 2.0})
    assert read_metrics(metrics.path) == {"loss": ([1, 2], [1.0, 2.0])}


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: field 'step' = None: expected a whole number"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 1, "loss": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: field 'loss' occurs more than once"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path, value: float) -> None:
    with MetricsLogger(tmp_path, tensorboard=False) as metrics:
        with pytest.raises(FloatingPointError, match=f"step 7: not a finite number: actor/grad_norm = {value}"):
            metrics.log(7, {"actor/loss": 1.0, "actor/grad_norm": value})
        assert metrics.path.read_text() == ""


def test_steps_never_go_back(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, resume_step=4, tensorboard=False) as metrics:
        with pytest.raises(ValueError, match="step 3 come after those of step 4"):
            metrics.log(3, {"loss": 1.0})
        metrics.log(4, {"validation/proxy_reward": 1.0})


def test_the_row_s_own_columns_are_not_metrics(tmp_path: Path) -> None:
    with (
        MetricsLogger(tmp_path, tensorboard=False) as metrics,
        pytest.raises(ValueError, match="cannot be called 'time'"),
    ):
        metrics.log(1, {"time": 1.0})


def test_wandb_gets_every_row(tmp_path: Path) -> None:
    rows = []

    class Sink:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            rows.append((step, metrics))

    with MetricsLogger(tmp_path, tensorboard=False, wandb=Sink()) as metrics:
        metrics.log(2, {"loss": 1.0})
    assert rows == [(2, {"loss": 1.0})]
