"""Which files a Hugging Face directory may consist of."""

import json
from pathlib import Path

import pytest
from hf_models import random_model, save

from nemo_eppo.config import ConfigError
from nemo_eppo.models.hf_directory import INDEX, WEIGHTS, HfDirectory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """In the layout of the hub's cache."""
    return save(random_model("Llama"), tmp_path / "models--a--b" / "snapshots" / "0123")


def _outside(directory: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"names '{name}', which lies, or links to a file, outside .*: refused"):
        HfDirectory(directory)


def test_an_index_names_no_file_outside_its_directory(directory: Path, tmp_path: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    for name in ("../0123.safetensors", str(tmp_path / "a.safetensors")):
        changed = dict.fromkeys(index["weight_map"], name)
        (directory / INDEX).write_text(json.dumps({"weight_map": changed}))
        _outside(directory, name)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": 1}}))
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: expected a weight_map of file names"):
        HfDirectory(directory)


def test_files_may_be_links_into_the_cache_that_they_are_in_and_nowhere_else(directory: Path, tmp_path: Path) -> None:
    blobs = directory.parent.parent / "blobs"
    blobs.mkdir()
    shards = sorted(directory.glob("*.safetensors"))
    for number, shard in enumerate(shards):
        shard.rename(blobs / str(number))
        shard.symlink_to(f"../../blobs/{number}")
    assert HfDirectory(directory).head == "lm"
    (blobs / "0").rename(tmp_path / "elsewhere")
    shards[0].unlink()
    shards[0].symlink_to(tmp_path / "elsewhere")
    _outside(directory, shards[0].name)
    (directory / INDEX).unlink()
    (directory / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    _outside(directory, WEIGHTS)
