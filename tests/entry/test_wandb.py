"""What Weights & Biases is told, by its own client, which keeps it on the disk."""

from pathlib import Path

import pytest
from count_job import run_job


@pytest.mark.slow
def test_every_start_of_a_run_goes_on_with_the_same_curves_and_brings_its_settings(script: Path) -> None:
    wandb = "exp_manager.wandb_logger_kwargs={name: n, project: p}"
    arguments = ["model.path=somewhere", "exp_manager.create_wandb_logger=true", wandb]
    for steps in (3, 4):
        environment = {"WANDB_MODE": "offline", "FACTS": str(script.parent / "facts.json")}
        status, output = run_job(script, *arguments, f"steps={steps}", **environment)
        assert status == 0, output
    run = script.parent / "run"
    records = sorted(run.rglob("*.wandb"))
    assert [file.stem for file in records] == [f"run-{(run / 'run_id').read_text().strip()}"] * 2
    assert all(b"somewhere" in file.read_bytes() for file in records)  # a setting
