"""Reads raw rows from local .jsonl, .json and .parquet files, or from a data set of the Hugging Face hub.

Sources are streamed: one line, or one batch of a row group, is in memory at a time; but a JSON array entirely.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import DAMAGED_ARCHIVE, open_stream, read_lines
from nemo_eppo.files import NotAnObject, json_object

_WHITESPACE = re.compile(r"\s*")
_BUFFER_SIZE = 1 << 20  # bytes
_PARQUET_BATCH = 1024  # rows


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row, and its place in its file."""

    file: str
    line: int
    """Number of the line in a text file, or of the row in a table, from 1."""
    fields: Mapping[str, Any]
    defect: str = ""
    """Reason why the row cannot be read; empty if it can."""


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set of the hub, or a local directory that the `datasets` library can load."""

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return ":".join(part for part in (self.name, self.config, self.split) if part)


def read_rows(source: Path | HubDataset, progress: bool = False) -> Iterator[Row]:
    """Read the rows of one source in their order. A malformed line is a row with a defect.

    Raises:
        ConfigError: there is no such file or data set, its suffix is unknown, or an archive, array or table is damaged.
    """
    if isinstance(source, HubDataset):
        return _hub_rows(source)
    name = source.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _line_rows(source, progress)
    if name.endswith(".json"):
        return _array_rows(source) if _starts_array(source) else _line_rows(source, progress)
    if source.suffix == ".parquet":
        return _parquet_rows(source)
    raise ConfigError(f"{source}: expected .jsonl, .jsonl.gz, .json, .json.gz or .parquet")


def _line_rows(path: Path, progress: bool) -> Iterator[Row]:
    for line_number, line in read_lines(path, progress):
        yield _row(path, line_number, line)


def _row(path: Path, line: int, text: str | bytes) -> Row:
    try:
        return Row(str(path), line, json_object(text))
    except NotAnObject as error:
        return Row(str(path), line, {}, error.reason)


def _starts_array(path: Path) -> bool:
    """Return whether the file is one JSON array; otherwise it has one object per line, which some call .json too."""
    with open_stream(path, progress=False) as (file, _):
        try:
            while (start := file.read(_BUFFER_SIZE)) and not start.strip():
                pass
            return start.lstrip()[:1] == b"["
        except DAMAGED_ARCHIVE as error:
            raise ConfigError(f"{path}: damaged archive: {error}") from None


def _array_rows(path: Path) -> Iterator[Row]:
    """Read the elements of an array, each with the line on which it begins."""
    with open_stream(path, progress=False) as (file, _):
        try:
            text = file.read().decode()
        except DAMAGED_ARCHIVE as error:
            raise ConfigError(f"{path}: damaged archive: {error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8: {error}") from None
    decode, position = json.JSONDecoder().raw_decode, text.index("[") + 1
    line = 1 + text.count("\n", 0, position)
    while not text.startswith("]", start := _skip_space(text, position)):
        try:
            _, end = decode(text, start)
        except RecursionError:
            raise ConfigError(f"{path}: the JSON array is nested too deep after line {line}") from None
        except ValueError:
            raise ConfigError(f"{path}: damaged JSON array after line {line}") from None
        end = _skip_space(text, end)
        if not text.startswith((",", "]"), end):
            raise ConfigError(f"{path}: damaged JSON array after line {line}")
        line += text.count("\n", position, start)
        yield _row(path, line, text[start:end])
        line += text.count("\n", start, end)
        position = end + (text[end] == ",")
    if text[start + 1 :].strip():
        raise ConfigError(f"{path}: there is more after the end of its JSON array")


def _skip_space(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return match.end() if match else position


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    line = 0
    try:
        # without a buffer size, or across row groups, pyarrow keeps all pages it has read: memory grows with the file
        with ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_SIZE) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_PARQUET_BATCH, row_groups=[group]):
                    for fields in batch.to_pylist():
                        line += 1
                        yield Row(str(path), line, fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: damaged parquet file after row {line}: {error}") from None


def _hub_rows(source: HubDataset) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"data set '{source}': reading from the hub needs 'pip install datasets'") from None
    try:
        rows = load_dataset(source.name, source.config, split=source.split)  # memory-mapped from the local cache
    except Exception as error:  # datasets, huggingface_hub, requests and pyarrow each raise their own
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"data set '{source}' cannot be loaded: {type(error).__name__}: {reason}. "
            "Without network, fetch its files elsewhere and give them as --input"
        ) from error
    for line, fields in enumerate(rows, start=1):
        yield Row(str(source), line, fields)
