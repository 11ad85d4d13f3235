"""The critic as its server calls it: what it refuses, on all ranks alike, and with its state unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from jobs import Models

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.models import checkpoint_files
from nemo_eppo.servers.protocol import ServerEnding, ServiceError
from nemo_eppo.servers.service import Tensors
from nemo_eppo.settings.critic import CriticConfig
from nemo_eppo.training.critic import CriticService


def request(rows: int, **changes: Any) -> Tensors:
    shape = (rows, 5)
    return {
        "tokens": torch.ones(rows, 6, dtype=torch.int64),
        "lengths": torch.full((rows,), 6),
        "returns": torch.ones(shape),
        "values": torch.zeros(shape),
        "mask": torch.ones(shape, dtype=torch.bool),
        **changes,
    }


def begin(run: int, step: int, fresh: bool = False) -> Tensors:
    return {"run": torch.tensor([run]), "step": torch.tensor([step]), "fresh": torch.tensor([fresh])}


def said(service: CriticService, endpoint: str, tensors: Tensors) -> str:
    try:
        service.endpoints[endpoint](tensors)
    except ServiceError as error:
        return str(error)
    return ""


def started(models: Models, directory: Path, lr: float = 1e-6) -> CriticService:
    values = {"model": {"restore_from_path": models.rm}, "optimizer": {"lr": lr}}
    return CriticService(load_config(CriticConfig, values), directory)


def updates(models: Models, directory: Path) -> tuple[list[str], int]:
    service = started(models, directory)
    return [said(service, "critic_train", request(rows)) for rows in (1, 4)], service.step


def test_an_update_too_small_for_the_layout_is_refused_and_the_critic_goes_on(models: Models, tmp_path: Path) -> None:
    for (small, enough), step in run_ranks(updates, 2, models, tmp_path):
        assert small.startswith("critic update 1: tokens: 1 rows cannot fill the micro-batches of 2 data-parallel")
        assert (enough, step) == ("", 1)


def test_a_learning_rate_that_falls_is_told_over_how_many_updates() -> None:
    optimizer = {"lr": 1e-6, "schedule": "cosine"}
    values = {"model": {"restore_from_path": "rm"}, "optimizer": optimizer}
    with pytest.raises(ConfigError, match=r"optimizer\.schedule = 'cosine' needs optimizer\.decay_steps"):
        load_config(CriticConfig, values)  # else it would be 0 from the second update on
    load_config(CriticConfig, values | {"optimizer": optimizer | {"decay_steps": 100}})


def beginnings(models: Models, directory: Path) -> list[str]:
    service = started(models, directory)
    found = [said(service, "critic_begin", begin(run, 0)) for run in (1, 2)]
    service.endpoints["critic_train"](request(2))
    return found + [said(service, "critic_begin", begin(run, 1)) for run in (2, 3)]


def test_what_a_critic_has_learnt_belongs_to_one_run(models: Models, tmp_path: Path) -> None:
    [(first, other, same, foreign)] = run_ranks(beginnings, 1, models, tmp_path)
    assert (first, other, same) == ("", "", "")  # a critic that has learnt nothing serves any run
    assert foreign.startswith("the critic has made 1 updates of another run")


def going_back(models: Models, directory: Path) -> tuple[list[str], list[str], str]:
    service, saved = started(models, directory), []
    service.endpoints["critic_begin"](begin(1, 0))
    for _ in range(2):
        service.endpoints["critic_train"](request(2))
        service.endpoints["critic_save"]({"keep": torch.tensor([0, 1]), "step": torch.tensor([service.step])})
        service.endpoints["critic_saved"]({"step": torch.tensor([service.step])})
        saved.append(sorted(path.name for path in directory.glob("checkpoints/*"))[-1])
    weights = directory / "checkpoints" / "step_000002" / checkpoint_files.WEIGHTS
    next(path for path in weights.iterdir() if path.suffix == ".distcp").unlink()  # a damaged one is in nobody's way
    service.endpoints["critic_begin"](begin(1, 1))
    left = sorted(path.name for path in directory.glob("checkpoints/*"))
    service.endpoints["critic_train"](request(2))
    try:
        service.endpoints["critic_saved"]({"step": torch.tensor([2])})
    except ServerEnding as error:
        return saved, left, str(error)
    return saved, left, ""


def test_a_critic_that_went_back_finds_no_checkpoint_of_before(models: Models, tmp_path: Path) -> None:
    [(saved, left, error)] = run_ranks(going_back, 1, models, tmp_path)
    assert saved == ["step_000001", "step_000002"]
    assert left == ["step_000001"]
    assert error.endswith("step_000002 was not saved")


def anew(models: Models, directory: Path) -> tuple[list[Tensors], int, list[str], str]:
    service = started(models, directory, lr=1e-2)
    values = [service.endpoints["critic_infer"](request(2))]
    service.endpoints["critic_begin"](begin(1, 0))
    service.endpoints["critic_train"](request(2, values=values[0]["values"]))
    service.endpoints["critic_save"]({"keep": torch.tensor([0]), "step": torch.tensor([1])})
    values.append(service.endpoints["critic_infer"](request(2)))
    service.endpoints["critic_begin"](begin(2, 0, fresh=True))
    values.append(service.endpoints["critic_infer"](request(2)))
    saved = sorted(path.name for path in directory.glob("checkpoints*/*"))
    service.endpoints["critic_begin"](begin(1, 0, fresh=True))
    service.endpoints["critic_train"](request(2, values=values[0]["values"]))
    return values, service.step, saved, said(service, "critic_begin", begin(2, 0, fresh=True))


def test_a_critic_begins_a_fresh_run_and_sets_the_other_aside(models: Models, tmp_path: Path) -> None:
    [((untrained, trained, fresh), _, saved, again)] = run_ranks(anew, 1, models, tmp_path)
    assert again.endswith("checkpoints_of_run_1, which exists")
    assert not torch.equal(untrained["values"], trained["values"])
    assert torch.equal(untrained["values"], fresh["values"])
    assert (tmp_path / "checkpoints_of_run_1" / "step_000001").is_dir()
    assert saved == ["step_000001"]
