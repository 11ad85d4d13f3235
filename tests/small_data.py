"""Small tokenizers and files shared by the data tests."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_eppo.data.tokenizer import Tokenizer, word_level

WORDS = ["red", "green", "blue", "one", "two", "three"]  # ids 2 to 7; 0 is <eos>, 1 is <pad>


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Word-level tokenizer over WORDS."""
    directory = tmp_path_factory.mktemp("words")
    word_level(WORDS, directory)
    return Tokenizer.from_directory(directory)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines; text is written as it is."""

    def write(*rows: Mapping[str, object] | str, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def dialogue(question: str, answer: str) -> str:
    """A question and its answer as the HH corpus writes them."""
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"
