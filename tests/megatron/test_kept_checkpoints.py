"""The order of checkpoints, and which of them stay."""

from pathlib import Path

from tiny import MODEL

from nemo_eppo.megatron.saving import tidy
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.training import CheckpointConfig


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    names = ["step_999998", "step_999999", "step_1000000", "step_1000001"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint_files.MANIFEST).touch()
    assert [path.name for path in checkpoint_files.complete_in(tmp_path)] == names


def test_a_best_checkpoint_may_be_asked_for_later(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, best="validation/reward")

    def after(step: int, metrics: dict[str, float]) -> list[str]:
        """Names in the folder after a checkpoint of this step."""
        manifest = checkpoint_files.Manifest(head="lm", step=step, model=MODEL, metrics=metrics)
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / checkpoint_files.MANIFEST).write_text(manifest.model_dump_json())
        tidy(tmp_path, config)
        return sorted(path.name for path in tmp_path.iterdir())

    assert after(1, {}) == ["step_1"]  # saved before there was a validation
    assert after(2, {"validation/reward": 0.5}) == ["best", "step_2"]
    assert after(3, {"validation/reward": 0.25}) == ["best", "step_2", "step_3"]
    assert (tmp_path / "best").resolve().name == "step_2"
