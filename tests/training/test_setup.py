"""Building a planned model."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
from distributed import run_ranks
from jobs import Models

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.megatron import runtime
from nemo_eppo.settings.model import ModelSetup
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.training.setup import build, plan


def left_of_the_first_of_two_models(models: Models) -> list[bool]:
    """Whether weights, gradients and optimizer of a model that was let go of outlive the building of the next."""
    planned = plan(ModelSetup(restore_from_path=models.sft))
    runtime.initialize(planned.setup.parallel, 1)
    gc.disable()  # it would come too late or not at all: a device's memory is not what Python counts
    runner = build(planned, "lm", optimizer=OptimizerConfig(lr=1e-6))
    held = (*runner.chunks[0].parameters(), runner.chunks[0].buffers[0].grad_data, runner.optimizer)
    watched = [weakref.ref(thing) for thing in held]
    del runner, held
    build(planned, "lm", optimizer=OptimizerConfig(lr=1e-6))
    return [reference() is not None for reference in watched]


def test_a_model_that_is_let_go_of_leaves_its_memory_to_the_next(models: Models) -> None:
    [left] = run_ranks(left_of_the_first_of_two_models, 1, models)
    assert not any(left)


def test_a_tokenizer_with_other_token_ids_than_the_model_s_own_has_to_be_allowed(
    models: Models, tmp_path: Path
) -> None:
    word_level(["red", "green"], tmp_path / "other")
    setup = ModelSetup(restore_from_path=models.sft, tokenizer=tmp_path / "other")
    with pytest.raises(
        ConfigError, match=r"model\.tokenizer = .*/other: .* null takes that one, model\.allow_other_to"
    ):
        plan(setup)
    forced = plan(setup.model_copy(update={"allow_other_tokenizer": True}))
    assert forced.tokenizer.vocab_size == 4
    same = shutil.copytree(models.data / "tokenizer", tmp_path / "same")
    assert plan(setup.model_copy(update={"tokenizer": same})).tokenizer_path == same
    bare = shutil.copytree(models.sft, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    manifest = bare / "manifest.json"
    contents = json.loads(manifest.read_text())
    contents["files"] = {name: entry for name, entry in contents["files"].items() if "tokenizer" not in name}
    manifest.write_text(json.dumps(contents))
    assert plan(setup.model_copy(update={"restore_from_path": bare})).tokenizer.vocab_size == 4, "it has none"


def test_a_run_directory_is_told_where_its_checkpoints_are(models: Models, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000001").symlink_to(models.sft)
    hint = f"--model: {tmp_path} is no checkpoint and holds none .*the directory of a run.* in {tmp_path}/checkpoints"
    with pytest.raises(ConfigError, match=hint):
        plan(ModelSetup(restore_from_path=tmp_path), "--model")
