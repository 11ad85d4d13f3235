"""Ensembles and WARM: what members share and where they differ, which are averaged, and what the average is."""

import contextlib
import itertools
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from jobs import WARM, Models, _train_warm, reward_training

from nemo_eppo.config import ConfigError, RunStopped
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.optimizer import train_head_only
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.model import ModelSetup, ParallelConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.training.fit import Fit
from nemo_eppo.training.reward_model import RewardTask, train_reward_model
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.setup import build, plan


def weights(sources: list[Path]) -> list[dict[str, torch.Tensor]]:
    loaded = []
    for source in sources:
        setup = ModelSetup(restore_from_path=source)
        planned = plan(setup)
        runtime.initialize(setup.parallel, 1)
        runner = build(planned, "scalar")
        loaded.append({name: tensor.clone() for name, tensor in export_tensors(runner.chunks, planned.model)})
    return loaded


def test_the_average_is_that_of_the_best_members_who_share_a_probed_head(
    models: Models, trained: dict[str, Path]
) -> None:
    root = trained["warm"].parent
    members = [root / f"member_{index}" / "checkpoints" for index in range(3)]
    probe, average, *each = run_ranks(weights, 1, [root / "linear_probe" / "checkpoints", trained["warm"], *members])[0]
    state = checkpoint_files.read_manifest(trained["warm"]).state
    manifests = [checkpoint_files.read_manifest(checkpoint_files.find(path, "member")) for path in members]
    accuracies = [manifest.metrics["validation/accuracy"] for manifest in manifests]
    chosen = [int(re.findall(r"member_(\d)", path)[0]) for path in state["average_of"]]
    assert len(chosen) == WARM["keep_best"]
    assert min(accuracies[index] for index in chosen) >= max(
        accuracy for index, accuracy in enumerate(accuracies) if index not in chosen
    )
    for name, found in average.items():
        torch.testing.assert_close(found, sum(each[index][name] for index in chosen) / len(chosen))
    assert not any(torch.equal(a["score.weight"], b["score.weight"]) for a, b in itertools.pairwise(each))
    distance = max(float((member["score.weight"] - probe["score.weight"]).norm()) for member in each)
    assert distance < 0.2 * float(probe["score.weight"].norm())  # all have started with the probe's head
    assert (state["kind"], state["std"] > 0) == ("warm", True)
    assert RewardModel(ModelSetup(restore_from_path=trained["warm"])).statistics["kind"] == "warm"


def test_what_is_trained_already_is_not_trained_again(models: Models, trained: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(trained["warm"].parent, tmp_path / "warm")  # that one is for all tests, and averaged anew
    files = [*root.glob("*/metrics.jsonl")]
    before = {path: path.read_text() for path in files}
    assert len(files) == 4
    run_ranks(_train_warm, 1, models, root)
    assert {path: path.read_text() for path in files} == before


def _stop_in_the_probe(models: Models, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    run = Run(directory, 0, logging.getLogger(), ExpManagerConfig(max_time_per_run="00:00:00:00"))
    ensemble = WARM | {"linear_probe_steps": 3}
    logging.basicConfig(filename=directory / "log.txt", format="%(message)s", level=logging.INFO, force=True)
    with contextlib.suppress(RunStopped):
        train_reward_model(reward_training(models, "bradley_terry", ensemble=ensemble), run)


def test_a_probe_that_was_stopped_begins_anew(models: Models, tmp_path: Path) -> None:
    for _ in range(2):
        run_ranks(_stop_in_the_probe, 1, models, tmp_path / "warm")
    assert not list((tmp_path / "warm").glob("**/step_*"))
    said = "max_time_per_run = 00:00:00:00: ending. A linear probe is not saved, the same command begins it anew."
    assert (tmp_path / "warm" / "log.txt").read_text().count(said) == 2


def probe(models: Models, parallel: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Weights before and after an update of the head alone, and the norm of its gradient."""
    setup = ModelSetup(restore_from_path=models.rm, parallel=ParallelConfig(**parallel), micro_batch_size=2)
    config, planned = reward_training(models, "bradley_terry"), plan(setup)
    task = RewardTask(config.data, config.reward, planned, seed=5)
    runtime.initialize(setup.parallel, 1)
    runner = build(planned, "scalar", optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-4))
    train_head_only(runner.chunks, runner.optimizer)
    before = {name: tensor.clone() for name, tensor in export_tensors(runner.chunks, planned.model)}
    rows = task.rows(list(range(8)))
    report = runner.train_step(rows, task.loss_function(rows), group=2)
    return before, dict(export_tensors(runner.chunks, planned.model)), report["grad_norm"]


@pytest.fixture(scope="module")
def probed(models: Models) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after the update on one rank, and the norm of the gradient."""
    _, after, norm = run_ranks(probe, 1, models, {})[0]
    return after, norm


@pytest.mark.parametrize(
    "parallel",
    [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}],
    ids=["tp2_sp", "pp2"],
)
def test_a_linear_probe_moves_the_head_alone_in_every_layout(
    parallel: dict[str, Any], models: Models, probed: tuple[dict[str, torch.Tensor], float]
) -> None:
    expected, norm = probed
    for before, after, found_norm in run_ranks(probe, 2, models, parallel):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved <= {"score.weight", "score.bias"}
        assert "score.weight" in moved
        torch.testing.assert_close(after["score.weight"], expected["score.weight"], rtol=0, atol=1e-4)
        assert found_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("ensemble", "message"),
    [
        ({"average": True}, "average = true needs at least 2 members"),
        ({"members": 3, "keep_best": 2}, "keep_best = 2 needs average = true"),
        ({"members": 2, "average": True, "keep_best": 3}, "keep_best = 3"),
        ({"members": 0}, r"ensemble\.members = 0"),
        ({"lrs": [0.0]}, "lrs: 0.0"),
        ({"dropouts": [1.0]}, "dropouts: 1.0"),
    ],
)
def test_bad_settings_are_named(ensemble: dict[str, Any], message: str, models: Models) -> None:
    with pytest.raises(ConfigError, match=message):
        reward_training(models, "bradley_terry", ensemble=ensemble)


@pytest.mark.parametrize(
    ("ensemble", "expected"),
    [
        ({"lrs": [1e-5], "dropouts": [0.2]}, [(".", 1e-5, 0.2, 1234)]),
        ({"dropouts": [0.2, 0.3]}, [(".", 1e-3, 0.2, 1234)]),
        ({"members": 2, "lrs": [1e-5]}, [("member_0", 1e-5, 0.0, 1234), ("member_1", 1e-5, 0.0, 1235)]),
    ],
)
def test_each_member_gets_its_folder_learning_rate_dropout_and_seed(
    ensemble: dict[str, Any], expected: list[Any], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(fit: Fit) -> Path:
        place = fit.run.directory.relative_to(tmp_path)
        seen.append((str(place), fit.optimizer.lr, fit.dropout, fit.seed))
        return place

    monkeypatch.setattr(Fit, "train", train)
    config = reward_training(models, "bradley_terry", ensemble=ensemble)
    train_reward_model(config, Run(tmp_path, 0, logging.getLogger(), ExpManagerConfig()))
    assert seen == expected


def test_members_without_a_common_head_are_not_averaged(models: Models, tmp_path: Path) -> None:
    config = reward_training(models, "bradley_terry", ensemble={"members": 2, "average": True})
    with pytest.raises(ConfigError, match="averages members that share one head"):
        train_reward_model(config, Run(tmp_path, 0, logging.getLogger(), ExpManagerConfig()))


def with_dropout(models: Models, parallel: dict[str, Any]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Losses of the same pairs without and with dropout, and the head after an update."""
    setup = ModelSetup(restore_from_path=models.rm, parallel=ParallelConfig(**parallel), micro_batch_size=2)
    config, planned = reward_training(models, "bradley_terry"), plan(setup)
    task, losses = RewardTask(config.data, config.reward, planned, seed=5), []
    runtime.initialize(setup.parallel, 1)
    for dropout in (0.0, 0.3):
        runner = build(planned, "scalar", dropout=dropout, optimizer=OptimizerConfig(lr=1e-2))
        rows = task.rows(list(range(8)))
        losses.append(runner.train_step(rows, task.loss_function(rows), group=2)["loss"])
    return losses[0], losses[1], dict(export_tensors(runner.chunks, planned.model))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_is_at_work_and_leaves_tensor_parallel_ranks_agreeing(sequence_parallel: bool, models: Models) -> None:
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    (without, dropped, weights), (_, other_dropped, other_weights) = run_ranks(with_dropout, 2, models, layout)
    assert abs(without - dropped) > 1e-3
    assert dropped == other_dropped
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


def train_bf16(models: Models, kind: str, directory: Path) -> list[str]:
    config = reward_training(
        models,
        kind,
        model={"restore_from_path": models.sft, "precision": "bf16"},
        ensemble={"members": 2, "linear_probe_steps": 1, "average": True},
    )
    directory.mkdir()
    train_reward_model(config, Run(directory, 0, logging.getLogger(), ExpManagerConfig()))
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", ["odin", "inform"])
def test_every_kind_trains_and_averages_in_bf16(kind: str, models: Models, tmp_path: Path) -> None:
    made = run_ranks(train_bf16, 1, models, kind, tmp_path / kind)[0]
    assert made == ["average", "linear_probe", "member_0", "member_1"]
    model = RewardModel(ModelSetup(restore_from_path=tmp_path / kind / "average"))
    assert (model.head, model.statistics["kind"], model.statistics["std"][0] > 0) == (kind, kind, True)
