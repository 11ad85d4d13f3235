"""A launch in which a job answers the actor's prompts with the SFT model, before the actor or beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import Models, nursery
from launched import eppo, write

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.examination import check_launch
from nemo_eppo.launch.launch_file import read_launch
from nemo_eppo.launch.local import run_local
from nemo_eppo.launch.stages import stages
from nemo_eppo.observability.metrics import read_metrics

SHARED = ("model.restore_from_path", "data", "generation.max_new_tokens")


def launch_of(models: Models, output: Path, **energies: Any) -> dict[str, Any]:
    """An actor without servers, and the job that fills its cache."""
    launch = eppo(models, output)
    settings = launch["jobs"]["actor"]["settings"] | {
        "method": "eppo_grpo",
        "ppo.samples_per_prompt": 2,
        "rewards": [{"function": "nemo_eppo.tools.noun_task:gold_reward"}],
        "energy.cache": "${output}/energies_of_all",
        "model.parallel.tensor_model_parallel_size": 1,
    }
    actor = {"script": "train_gpt_ppo_actor", "settings": settings}
    own = {key: settings[key] for key in (*SHARED, "energy.cache")} | energies
    job = {"script": "read_reference_energies", "ranks_per_node": 2, "settings": own}
    return launch | {"jobs": {"actor": actor, "energies": job}}


def energies_of(output: Path) -> list[float]:
    """The reference's energy losses in each step of the actor."""
    return read_metrics(output / "actor" / "metrics.jsonl")["energy/reference"][1]


@pytest.fixture(scope="module")
def before(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a launch whose actor starts when all prompts are answered."""
    root = tmp_path_factory.mktemp("before")
    launch = launch_of(models, root / "out", batch_size=200)
    launch["jobs"]["actor"]["needs"] = ["energies"]
    file = write(launch, root / "launch.yaml")
    check_launch(read_launch(file), here=True)
    run_local(read_launch(file), nursery())
    return root / "out"


def test_the_actor_answers_nothing_that_was_answered_before(models: Models, before: Path) -> None:
    [written] = (before / "energies_of_all").glob("*/*.jsonl")  # each process that writes has its own file
    rows = (models.data / "prompts.train.jsonl").read_text().splitlines()
    assert len(written.read_text().splitlines()) == len(set(rows))
    log = (before / "energies" / "log.txt").read_text()
    assert f"all {len(rows)} prompts are answered; their energies are in {written.parent}" in log
    assert len(energies_of(before)) == 2


def test_beside_each_other_both_answer_and_the_actor_reads_the_same(
    models: Models, before: Path, tmp_path: Path
) -> None:
    run_local(
        read_launch(write(launch_of(models, tmp_path / "out", batch_size=8), tmp_path / "launch.yaml")), nursery()
    )
    written = [*(tmp_path / "out" / "energies_of_all").glob("*/*.jsonl")]
    keys = {json.loads(line)["prompt"] for file in written for line in file.read_text().splitlines()}
    assert len(keys) == len(set((models.data / "prompts.train.jsonl").read_text().splitlines()))
    assert energies_of(tmp_path / "out") == pytest.approx(energies_of(before), rel=1e-6)


def test_without_a_need_it_is_a_stage_of_its_own_on_a_cluster(models: Models, tmp_path: Path) -> None:
    launch = read_launch(write(launch_of(models, tmp_path / "out"), tmp_path / "launch.yaml"))
    assert {stage.trainer: stage.after for stage in stages(launch)} == {"actor": (), "energies": ()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation.max_new_tokens": 19}, "generation.max_new_tokens = 19, of actor 20"),
        ({"energy.preset": "down_proj"}, "energy.preset = 'down_proj', of actor 'paper'"),
        ({"energy.cache": "/elsewhere"}, "energy.cache = '/elsewhere', of actor '"),
        ({"model.precision": "bf16"}, "model.precision = 'bf16', of actor 'fp32'"),
    ],
)
def test_answers_that_the_actor_would_not_find_are_refused(
    changes: dict[str, Any], message: str, models: Models, tmp_path: Path
) -> None:
    launch = read_launch(write(launch_of(models, tmp_path / "out", **changes), tmp_path / "launch.yaml"))
    with pytest.raises(ConfigError, match=message):
        check_launch(launch, here=True)


def test_no_job_starts_from_one_that_makes_no_model(models: Models, tmp_path: Path) -> None:
    launch = launch_of(models, tmp_path / "out")
    launch["jobs"]["actor"]["settings"]["model.restore_from_path"] = "${output}/energies/checkpoints"
    launch["jobs"]["actor"]["needs"] = ["energies"]
    with pytest.raises(ConfigError, match="the job energies makes no checkpoint there"):
        check_launch(read_launch(write(launch, tmp_path / "launch.yaml")), here=True)
