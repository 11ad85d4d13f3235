"""A checkpoint of a stranger: nothing in it is run, whatever loads it, and it names no files outside of it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import MODEL, TP2, Layout, build_runner, random_batch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.megatron import checkpoint
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.training import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=0.01)
WEIGHT = "output_layer.weight"
STATE = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"  # what TransformerEngine unpickles once more


class Code:
    """Makes the directory `marker` wherever it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._marker),)


def _metadata(weights: Path) -> Metadata:
    found: Metadata = pickle.loads((weights / ".metadata").read_bytes())
    return found


def _write(weights: Path, metadata: object) -> None:
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_metadata(weights: Path, code: Code) -> None:
    metadata = _metadata(weights)
    metadata.planner_data = code
    _write(weights, metadata)


def _in_place_of_metadata(weights: Path, code: Code) -> None:
    _write(weights, code)


def _in_common_state(weights: Path, code: Code) -> None:
    torch.save(torch.load(weights / "common.pt") | {"scheduler": code}, weights / "common.pt")


def _in_entry(weights: Path, code: Code, name: str, is_tensor: bool) -> None:
    """Point all of an entry's places to a pickle at the end of a file."""
    metadata, file = _metadata(weights), next(iter(weights.glob("*.distcp")))
    start = file.stat().st_size
    with file.open("ab") as stream:
        torch.save(code, stream)
    info = _StorageInfo(file.name, start, file.stat().st_size - start)
    places = [index for index in metadata.storage_data if index.fqn == name]
    if not is_tensor:
        for index in places:
            del metadata.storage_data[index]
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        places = [MetadataIndex(name)]
    metadata.storage_data |= dict.fromkeys(places, info)
    _write(weights, metadata)


def _in_tensor(weights: Path, code: Code) -> None:
    _in_entry(weights, code, WEIGHT, is_tensor=True)


def _in_bytes_in_place_of_tensor(weights: Path, code: Code) -> None:
    _in_entry(weights, code, WEIGHT, is_tensor=False)


def _in_optimizer_state(weights: Path, code: Code) -> None:
    _in_entry(weights, code, f"optimizer.state.exp_avg.{WEIGHT}", is_tensor=False)


def _in_state_of_quantised_training(weights: Path, code: Code) -> None:
    _in_entry(weights, code, STATE, is_tensor=False)


EVERYWHERE = [
    _in_metadata,
    _in_place_of_metadata,
    _in_common_state,
    _in_tensor,
    _in_bytes_in_place_of_tensor,
    _in_optimizer_state,
    _in_state_of_quantised_training,
]


def _save(directory: Path) -> None:
    manifest = checkpoint_files.Manifest(head="lm", step=1, model=MODEL, optimizer=True)
    runner = build_runner({}, optimizer=OPTIMIZER)
    runner.train_step(random_batch(), lambda output, rows: (output.square().mean(), {}))  # or it has no moments
    checkpoint.save(directory, runner, manifest)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "step_000001"
    run_ranks(_save, 1, directory)
    return directory


@pytest.fixture
def theirs(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "theirs"))


def _seal_again(directory: Path) -> None:
    manifest = checkpoint_files.Manifest.model_validate_json((directory / checkpoint_files.MANIFEST).read_text())
    (directory / checkpoint_files.MANIFEST).unlink()
    checkpoint_files.seal(directory, manifest, None)


def _load(directory: Path, layout: Layout) -> str:
    runner = build_runner(layout, optimizer=OPTIMIZER)
    try:
        checkpoint.load(directory, runner, optimizer=True)
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_metadata_holds_what_is_expected_and_nothing_else_to_unpickle(theirs: Path) -> None:
    metadata = _metadata(theirs / "weights")
    assert not [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    assert run_ranks(_load, 2, theirs, TP2) == ["loaded", "loaded"]


@pytest.mark.parametrize("plant", EVERYWHERE)
def test_code_in_a_checkpoint_is_refused_when_training_resumes(
    plant: Callable[[Path, Code], None], theirs: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    plant(theirs / "weights", Code(marker))
    _seal_again(theirs)
    checkpoint_files.verify(theirs)
    for message in run_ranks(_load, 2 if plant is _in_tensor else 1, theirs, TP2 if plant is _in_tensor else {}):
        assert message.startswith(f"{theirs / 'weights'}"), message
        assert "was refused, and nothing in it was run: it holds posix.mkdir, which is no part of weights" in message
    assert not marker.exists()


@pytest.mark.parametrize("plant", [_in_metadata, _in_tensor])
def test_code_in_a_checkpoint_is_refused_when_it_is_converted(
    plant: Callable[[Path, Code], None], theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(theirs / "weights", Code(tmp_path / "marker"))
    word_level(["a"], theirs / "tokenizer")
    _seal_again(theirs)
    command = ["convert", "megatron-to-hf", "--input", str(theirs), "--output", str(tmp_path / "hf")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{theirs / 'weights'}" in error
    assert "was refused, and nothing in it was run: it holds posix.mkdir" in error
    assert not (tmp_path / "marker").exists()


def test_damaged_pickles_are_named(theirs: Path) -> None:
    (theirs / "weights" / "common.pt").write_bytes(b"no pickle")
    _seal_again(theirs)
    [message] = run_ranks(_load, 1, theirs, {})
    assert message.startswith(f"{theirs / 'weights' / 'common.pt'} cannot be read: ")
    (theirs / "weights" / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ConfigError, match=r"weights/\.metadata cannot be read: 'list' object has no attribute"):
        checkpoint_files.stored_precision(theirs)


@pytest.mark.parametrize("link", [False, True])
def test_a_manifest_names_no_file_outside_its_checkpoint(link: bool, theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    manifest = json.loads((theirs / "manifest.json").read_text())
    names = ["../secret", str(tmp_path / "secret")]
    if link:
        (theirs / "weights" / "link").symlink_to(tmp_path / "secret")
        names = ["weights/link"]
    for name in names:
        changed = manifest | {"files": {name: {"size": 6, "sha256": "0"}}}
        (theirs / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError) as caught:
            checkpoint_files.read_manifest(theirs)
        assert str(caught.value) == (
            f"{theirs / 'manifest.json'} names {name!r}, which lies, or links to a file, outside {theirs}: refused"
        )


def test_metadata_names_no_file_outside_its_checkpoint(theirs: Path) -> None:
    weights = theirs / "weights"
    metadata = _metadata(weights)
    for place in metadata.storage_data.values():
        place.relative_path = f"../../outside/{place.relative_path}"
    _write(weights, metadata)
    with pytest.raises(ConfigError, match=r"\.metadata names '../../outside/.*outside .*weights: refused"):
        checkpoint_files.stored_precision(theirs)
