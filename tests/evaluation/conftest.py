"""Fixtures of this folder."""

import sys
from pathlib import Path

import pytest
from hf_models import random_model, save

from nemo_eppo.data.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[2] / "examples" / "overoptimization"))  # whose files are loaded by name


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose tokenizer has a chat template."""
    directory = save(random_model("Qwen3"), tmp_path_factory.mktemp("chat_model") / "hf")
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.chat_template = (
        "{% for m in messages %}w0 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
    )
    tokenizer.save(directory)
    return directory
