"""SFT and reward-model training: what is learnt, what is stored, and how an interrupted run resumes."""

import json
import logging
import os
import resource
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from jobs import Models
from reference_eppo import load_weights, policy_pass, scalars

from nemo_eppo.config import ConfigError, RunStopped, load_config
from nemo_eppo.data.datasets import GlobalBatches, PreferenceDataset, SFTDataset, collate
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.files import disk_trouble
from nemo_eppo.megatron.checkpoint import is_sharded
from nemo_eppo.megatron.saving import CheckpointSaver
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.reward_model import RewardTrainingConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.training import FitSettings, SFTConfig
from nemo_eppo.training.reward_model import train_reward_model
from nemo_eppo.training.sft import train_sft


def settings(models: Models, kind: str, steps: int | None, **fit: Any) -> dict[str, Any]:
    name = "sft" if kind == "sft" else "preferences"
    return {
        "model": {"restore_from_path": models.sft, "micro_batch_size": 3},
        "data": {
            "train": models.data / f"{name}.train.jsonl",
            "validation": models.data / f"{name}.validation.jsonl",
        },
        "fit": {"max_steps": steps, "global_batch_size": 8, **fit},
        "optimizer": {"lr": 3e-3, "schedule": "cosine", "eps": 1e-4},
    }


def train(kind: str, directory: Path, values: dict[str, Any]) -> list[dict[str, float]]:
    """Train in this process; the rows of metrics.jsonl."""
    directory.mkdir(exist_ok=True)
    manager = ExpManagerConfig(create_tensorboard_logger=False, **values.get("exp_manager", {}))
    run = Run(directory, int(os.environ["RANK"]), logging.getLogger(), manager)
    with suppress(RunStopped):
        if kind == "sft":
            train_sft(load_config(SFTConfig, values), run)
        else:
            train_reward_model(load_config(RewardTrainingConfig, values), run)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def learning(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows without clocks."""
    return [{k: v for k, v in row.items() if "second" not in k and k != "time"} for row in rows]


HALFWAY = {"checkpoint": {"interval": 2}}  # of four steps; there is a validation, too
Wholes = dict[str, tuple[Path, list[dict[str, float]]]]


@pytest.fixture(scope="module")
def wholes(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Of each kind the directory and metrics of four steps on one rank, with a checkpoint of the second."""
    found: Wholes = {}
    for kind in ("sft", "reward"):
        directory = tmp_path_factory.mktemp("wholes") / kind
        values = settings(models, kind, 4) | HALFWAY
        found[kind] = directory, run_ranks(train, 1, kind, directory, values)[0]
    return found


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_packed_training_is_padded_training(kind: str, models: Models, wholes: Wholes, tmp_path: Path) -> None:
    packed_model = {"restore_from_path": models.sft, "micro_batch_tokens": 80}
    values = settings(models, kind, 4) | HALFWAY | {"model": packed_model}
    [packed] = run_ranks(train, 1, kind, tmp_path / "packed", values)
    for expected, found in zip(learning(wholes[kind][1]), learning(packed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_epochs_and_max_steps_are_alternatives() -> None:
    with pytest.raises(ConfigError, match=r"epochs = 2 and max_steps = 3: expected only one of them"):
        load_config(FitSettings, {"epochs": 2, "max_steps": 3, "global_batch_size": 8})


@pytest.mark.parametrize("answer_only", [True, False])
def test_the_first_sft_loss_is_the_references(answer_only: bool, models: Models, tmp_path: Path) -> None:
    values = settings(models, "sft", None) | {"answer_only_loss": answer_only}
    [rows] = run_ranks(train, 1, "sft", tmp_path / "run", values)
    assert len(rows) == 2, "one epoch, unless told otherwise"
    tokenizer = Tokenizer.from_directory(models.data / "tokenizer")
    data = SFTDataset(models.data / "sft.train.jsonl", tokenizer, max_sequence_length=48)
    seed = SFTConfig.model_fields["seed"].default
    batch = [data[index] for index in next(GlobalBatches(len(data), 8, seed=seed, digest=data.digest))]
    tokens, prompts, lengths = collate([(item.prompt_ids, item.response_ids) for item in batch], tokenizer.pad_id)
    logprobs, _, _ = policy_pass(load_weights(models.policy, False), tokens, models.reference)
    predicted = torch.arange(1, tokens.size(1))
    first = prompts[:, None] if answer_only else 1
    mask = (predicted >= first) & (predicted < lengths[:, None])
    assert rows[0]["train/loss"] == pytest.approx(-float(logprobs[mask].mean()), abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_training_learns_and_an_interrupted_run_goes_on_bit_for_bit(kind: str, models: Models, tmp_path: Path) -> None:
    whole = run_ranks(
        train, 1, kind, tmp_path / "whole", {**settings(models, kind, 12), "checkpoint": {"interval": 6}}
    )[0]
    assert whole[-1]["train/loss"] < 0.8 * whole[0]["train/loss"]
    # a run that finds the checkpoint of step 6 in its directory, as after a crash
    source = tmp_path / "whole" / "checkpoints" / "step_000006"
    target = tmp_path / "parts" / "checkpoints" / "step_000006"
    shutil.copytree(source, target)
    parts = run_ranks(
        train, 1, kind, tmp_path / "parts", {**settings(models, kind, 12), "checkpoint": {"interval": 6}}
    )[0]
    assert learning(parts) == learning(whole[6:])


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_run_goes_on_in_another_layout(kind: str, models: Models, wholes: Wholes, tmp_path: Path) -> None:
    values, (directory, whole) = settings(models, kind, 4), wholes[kind]
    shutil.copytree(directory / "checkpoints" / "step_000002", tmp_path / "parts" / "checkpoints" / "step_000002")
    split = values | {"model": values["model"] | {"parallel": {"tensor_model_parallel_size": 2}}}
    parts = run_ranks(train, 2, kind, tmp_path / "parts", split)[0]
    for row, expected in zip(learning(parts), learning(whole)[2:], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


def messages(directory: Path, models: Models) -> dict[str, str]:
    """What a finished run of one step says when it is started again: with other models, as another kind, on other
    data."""
    values, found = settings(models, "sft", 1), {}
    train("sft", directory, values)
    fresh = {"architecture": models.config.model_dump() | {"rotary_base": 5e5}, "tokenizer": models.data / "tokenizer"}
    for name, model in (("bf16", values["model"] | {"precision": "bf16"}), ("another base", fresh)):
        with pytest.raises(ConfigError) as error:
            train("sft", directory, values | {"model": model})
        found[name] = str(error.value)
    reordered = directory / "reordered.jsonl"
    lines = values["data"]["train"].read_text().splitlines(keepends=True)
    reordered.write_text("".join(reversed(lines)))
    for name, kind, other in (
        ("reward model", "rm", settings(models, "rm", 1)),
        ("data", "sft", values | {"data": values["data"] | {"train": reordered}}),
    ):
        with pytest.raises(ConfigError) as error:
            train(kind, directory, other)
        found[name] = str(error.value)
    return found


def test_a_run_that_goes_on_with_another_model_or_other_data_is_refused(models: Models, tmp_path: Path) -> None:
    [said] = run_ranks(messages, 1, tmp_path, models)
    assert "(precision = 'fp32', now 'bf16')" in said["bf16"]
    assert "(rotary_base = 10000.0, now 500000.0)" in said["another base"]
    assert "(head = 'lm', now 'scalar')" in said["reward model"]
    assert "the digest of its rows was" in said["data"]
    assert all("choose another run directory" in message for message in said.values())


def test_a_run_whose_time_is_up_is_saved_and_keeps_its_best_step(models: Models, tmp_path: Path) -> None:
    values = settings(models, "sft", 6) | {
        "checkpoint": {"interval": 1, "keep": 1, "best": "validation/loss", "best_is": "lowest"}
    }
    [whole] = run_ranks(train, 1, "sft", tmp_path / "whole", values)
    losses = {row["step"]: row["validation/loss"] for row in whole}
    best = min(losses, key=losses.__getitem__)
    folder = tmp_path / "whole" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == sorted({"best", f"step_{best:06d}", "step_000006"})
    assert (folder / "best").resolve().name == f"step_{best:06d}"

    limited = values | {"exp_manager": {"max_time_per_run": "00:00:00:00"}}
    for steps in (1, 2, 3):  # one each, then its time is up
        [rows] = run_ranks(train, 1, "sft", tmp_path / "parts", limited)
        assert learning(rows) == learning(whole)[:steps]
    values["checkpoint"]["best"] = "validation/accuracy"
    with pytest.raises(
        RuntimeError, match=r"checkpoint\.best = 'validation/accuracy': expected one of validation/loss"
    ):
        run_ranks(train, 1, "sft", tmp_path / "wrong", values)


def refused(directory: Path, values: dict[str, Any]) -> str | None:
    """What is told of a run whose checkpoint is larger than files may be."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        train("sft", directory, values)
    except OSError as error:
        return disk_trouble(error, None)
    return None


def test_a_checkpoint_that_the_disk_refuses_names_its_directory(models: Models, tmp_path: Path) -> None:
    told = run_ranks(refused, 2, tmp_path / "run", settings(models, "sft", 1))
    assert all(text.startswith(f"{tmp_path / 'run' / 'checkpoints'}: File too large; raise") for text in told)


def rows_before_checkpoints(directory: Path, values: dict[str, Any]) -> list[tuple[int, int]]:
    """Of each checkpoint its step, and that of the newest row of metrics when it begins to be saved."""
    seen, save = [], CheckpointSaver.save

    def look(saver: CheckpointSaver, runner: Any, manifest: checkpoint_files.Manifest, **others: Any) -> None:
        rows = (directory / "metrics.jsonl").read_text().splitlines()
        seen.append((manifest.step, json.loads(rows[-1])["step"] if rows else 0))
        save(saver, runner, manifest, **others)

    CheckpointSaver.save = look  # type: ignore[assignment]  # in a process of its own
    train("sft", directory, values)
    return seen


def test_a_kill_right_after_a_checkpoint_loses_no_metrics(models: Models, tmp_path: Path) -> None:
    values = settings(models, "sft", 4) | {"checkpoint": {"interval": 2}}
    assert run_ranks(rows_before_checkpoints, 1, tmp_path / "run", values) == [[(2, 2), (4, 4)]]


def interrupted(directory: Path, values: dict[str, Any]) -> list[dict[str, float]]:
    """A run with a log during which somebody presses Ctrl-C."""
    logging.basicConfig(filename=directory / "log.txt", format="%(message)s", level=logging.INFO, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:
        metrics = directory / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    return train("sft", directory, values)


def test_ctrl_c_saves_and_the_run_goes_on(models: Models, tmp_path: Path) -> None:
    values = settings(models, "sft", 500)
    [rows] = run_ranks(interrupted, 1, tmp_path, values)
    last = checkpoint_files.latest(tmp_path / "checkpoints")
    assert len(rows) < 500
    assert last is not None
    assert checkpoint_files.verify(last).step == rows[-1]["step"]
    end = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert end == f"SFT ended after step {rows[-1]['step']} of 500; its checkpoint is {last}"


def last_step_late(directory: Path, values: dict[str, Any]) -> str:
    """The log of a run of one step whose time is up after it."""
    directory.mkdir()
    logging.basicConfig(filename=directory / "log.txt", format="%(message)s", level=logging.INFO, force=True)
    train("sft", directory, values | {"exp_manager": {"max_time_per_run": "00:00:00:00"}})
    return (directory / "log.txt").read_text()


def test_a_run_that_is_done_is_not_told_to_resume(models: Models, tmp_path: Path) -> None:
    [said] = run_ranks(last_step_late, 1, tmp_path / "run", settings(models, "sft", 1))
    assert "SFT ended after step 1 of 1" in said
    assert "resumes" not in said


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_two_replicas_learn_the_same_as_one(kind: str, models: Models, wholes: Wholes, tmp_path: Path) -> None:
    values = settings(models, kind, None, epochs=2) | HALFWAY  # two steps each
    two = run_ranks(train, 2, kind, tmp_path / "two", values)[0]
    for a, b in zip(learning(wholes[kind][1]), learning(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


def train_as_on_gpus(directory: Path, values: dict[str, Any]) -> bool:
    """Train; tell whether the optimizer's states are saved in shards."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    train("sft", directory, values)
    return is_sharded(checkpoint_files.find(directory / "checkpoints", "checkpoints"))


def test_replicas_on_gpus_shard_the_states_unless_the_run_began_otherwise(models: Models, tmp_path: Path) -> None:
    values = settings(models, "sft", 1)
    values["model"]["precision"], values["optimizer"]["overlap_grad_reduce"] = "fp32", False
    assert run_ranks(train_as_on_gpus, 1, tmp_path / "one", values) == [False]
    values["fit"]["max_steps"] = 2
    assert run_ranks(train_as_on_gpus, 2, tmp_path / "one", values) == [False] * 2
    assert run_ranks(train_as_on_gpus, 2, tmp_path / "two", values) == [True] * 2


def test_the_reward_model_stores_mean_and_std_of_its_validation_scores(models: Models, tmp_path: Path) -> None:
    values = settings(models, "reward", 2)
    values["reward"] = {"score": "sum", "l2": 0.001}
    values["model"]["restore_from_path"] = models.rm  # known weights, and next to no learning
    values["optimizer"]["lr"] = 1e-12
    rows = run_ranks(train, 1, "reward", tmp_path / "run", values)[0]
    manifest = checkpoint_files.read_manifest(tmp_path / "run" / "checkpoints" / "step_000002", "scalar")

    pairs = PreferenceDataset(
        models.data / "preferences.validation.jsonl",
        Tokenizer.from_directory(models.data / "tokenizer"),
        max_sequence_length=48,
    ).items
    expected, lead = [], []
    weights = load_weights(models.scorer, False)
    for pair in pairs:
        tokens, prompts, lengths = collate(
            [(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)], pad_id=1
        )
        scores = scalars(weights, tokens, models.reference)
        sums = [float(row[p:n].sum()) for row, p, n in zip(scores, prompts, lengths, strict=True)]
        expected += sums
        lead.append(sums[0] > sums[1])
    assert manifest.state["score"] == "sum"
    assert manifest.state["mean"] == pytest.approx(float(torch.tensor(expected).mean()), abs=1e-4)
    assert manifest.state["std"] == pytest.approx(float(torch.tensor(expected).std(correction=0)), abs=1e-4)
    assert rows[-1]["validation/accuracy"] == pytest.approx(sum(lead) / len(lead))
