"""JSON-lines files, plain or gzipped: every defect is reported with its file, line and field."""

import gzip
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, cast

from tqdm import tqdm

from nemo_eppo.config import ConfigError

DAMAGED_ARCHIVE = (EOFError, gzip.BadGzipFile, zlib.error)


def read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield `(line number from 1, the text of each of fields)`; other fields are ignored, blank lines skipped.

    The file is streamed, so it may be larger than memory.

    Raises:
        ConfigError: no such file, a broken archive, a line that is not a JSON object, a field missing or not text.
    """
    for line_number, line in read_lines(path):
        yield line_number, _text_fields(line, fields, f"{path}:{line_number}")


def read_lines(path: Path, progress: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield `(line number from 1, line)` of the lines that are not blank.

    Raises:
        ConfigError: no such file, a broken archive.
    """
    line_number = 0
    with open_stream(path, progress) as (file, advance):
        try:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    yield line_number, line
                advance()
        except DAMAGED_ARCHIVE as error:
            raise ConfigError(f"{path}: damaged archive after line {line_number}: {error}") from None


@contextmanager
def open_stream(path: Path, progress: bool) -> Iterator[tuple[BinaryIO, Callable[[], object]]]:
    """Open a plain or gzipped file; calling the second value moves a progress bar to where reading has come.

    The bar shows only in a terminal and once reading has taken two seconds.

    Raises:
        ConfigError: no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    hidden = None if progress else True  # None: tqdm itself hides the bar when stderr is not a terminal
    with (
        path.open("rb") as stored,
        gzip.open(stored) if path.suffix == ".gz" else nullcontext(stored) as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, delay=2, disable=hidden) as bar,
    ):
        yield cast(BinaryIO, file), lambda: bar.update(stored.tell() - bar.n)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object per line, UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json_line(row))


def json_line(row: Mapping[str, str | int]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Give a directory to write into, whose content appears in `path` only if the block succeeds.

    Raises:
        ConfigError: `path` exists and is not an empty directory; nothing is ever overwritten.
    """
    partial = path / ".partial"
    if path.exists() and (not path.is_dir() or any(entry != partial for entry in path.iterdir())):
        raise ConfigError(f"output directory '{path}' already exists and is not empty; choose another or remove it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in partial.iterdir():
            entry.rename(path / entry.name)
    finally:
        shutil.rmtree(partial)


def _text_fields(line: bytes, fields: Sequence[str], where: str) -> tuple[str, ...]:
    try:
        row = json.loads(line)
    except ValueError as error:  # also bytes that are not UTF-8
        raise ConfigError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected a JSON object with {', '.join(fields)}; got {type(row).__name__}")
    for field in fields:
        if field not in row:
            raise ConfigError(f"{where}: field '{field}' is missing (the line has: {', '.join(row) or 'no fields'})")
        if not isinstance(row[field], str):
            raise ConfigError(f"{where}: field '{field}' = {row[field]!r:.80}: expected text")
        try:
            row[field].encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: legal JSON, but not text
            raise ConfigError(f"{where}: field '{field}' is not valid Unicode ({error.reason})") from None
    return tuple(row[field] for field in fields)
