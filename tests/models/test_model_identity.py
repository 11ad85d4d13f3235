"""A model that is replaced in place is another model; a checkpoint that is copied stays the same."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_eppo.models.checkpoint_files import MANIFEST, model_identity


def rewrite(file: Path) -> None:
    """Write the same bytes at another time."""
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [rewrite, lambda file: file.write_text("longer"), lambda file: file.unlink()])
def test_a_hugging_face_directory_is_known_by_its_files(change: Callable[[Path], object], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    before = model_identity(tmp_path)
    assert model_identity(tmp_path) == before
    change(tmp_path / "model.safetensors")
    assert model_identity(tmp_path) != before


def test_a_checkpoint_is_known_by_its_manifest(tmp_path: Path) -> None:
    original, copy = tmp_path / "a", tmp_path / "b"
    original.mkdir()
    (original / MANIFEST).write_text("digests of every file")
    shutil.copytree(original, copy)
    rewrite(copy / MANIFEST)
    assert model_identity(copy) == model_identity(original)
    (copy / MANIFEST).write_text("digests of other files")
    assert model_identity(copy) != model_identity(original)
