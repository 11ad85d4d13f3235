"""The models and data that the commands of this folder are given."""

from pathlib import Path

import hf_models
import pytest
from jobs import Models


@pytest.fixture(scope="session")
def world(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints sft and rm, their data, and the Hugging Face models hf and hf_rm."""
    world = tmp_path_factory.mktemp("world")
    (world / "words").mkdir()
    for name, source in (("sft", models.sft), ("rm", models.rm), ("data", models.data)):
        (world / name).symlink_to(source)
    hf_models.save(hf_models.random_model("Llama"), world / "hf", max_shard_size="1MB")
    hf_models.save(hf_models.random_model("Llama", scores=1), world / "hf_rm", max_shard_size="1MB")
    return world


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The working directory of a command."""
    directory = tmp_path / "here"
    directory.mkdir()
    return directory
