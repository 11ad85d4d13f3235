"""Reads and writes JSON-lines files, plain or gzipped; every defect is reported with its file, line and field."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from tqdm import tqdm

from nemo_eppo.config import ConfigError
from nemo_eppo.files import json_line, json_row, write_atomically

DAMAGED_ARCHIVE = (EOFError, gzip.BadGzipFile, zlib.error)


def read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield `(line number from 1, texts of the given fields)`; other fields are ignored, blank lines skipped.

    Raises:
        ConfigError: as `read_objects`; also if a field is missing or not text.
    """
    for line_number, row in read_objects(path):
        yield line_number, text_fields(row, fields, f"{path}:{line_number}")


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number from 1, row)` of the lines that are not blank.

    The file is streamed, so it may be larger than memory.

    Raises:
        ConfigError: there is no such file, the archive is damaged, or a line is not one JSON object with unique keys.
    """
    for line_number, line in read_lines(path):
        row = json_row(line, f"{path}:{line_number}")
        if b"\\ud" in line or b"\\uD" in line:  # perhaps a lone surrogate: legal JSON, but not text
            _check_unicode(row, f"{path}:{line_number}")
        yield line_number, row


def _check_unicode(row: Mapping[str, Any], where: str) -> None:
    for name, value in row.items():
        try:
            (name + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: field {name!a} is not valid Unicode ({error.reason})") from None


def text_fields(row: Mapping[str, Any], fields: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the text of each of `fields`; ConfigError, which begins with `where`, if one is missing or not text."""
    for field in fields:
        if field not in row:
            raise ConfigError(f"{where}: field '{field}' is missing (the line has: {', '.join(row) or 'no fields'})")
        if not isinstance(row[field], str):
            hint = "; `nemo-eppo prepare chat` makes it of conversations" if isinstance(row[field], list) else ""
            raise ConfigError(f"{where}: field '{field}' = {row[field]!r:.80}: expected text{hint}")
        _check_unicode({field: row[field]}, where)
    return tuple(row[field] for field in fields)


def read_lines(path: Path, progress: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield `(line number from 1, line)` of the lines that are not blank.

    Raises:
        ConfigError: there is no such file, or the archive is damaged.
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
    """Open a plain or gzipped file; calling the second value moves a progress bar to the current position.

    The bar shows only in a terminal and once reading has taken two seconds.

    Raises:
        ConfigError: there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {'a directory, expected a file' if path.is_dir() else 'no such file'}")
    hidden = None if progress else True  # None: tqdm itself hides the bar when stderr is not a terminal
    with (
        path.open("rb") as stored,
        gzip.open(stored) if path.suffix == ".gz" else nullcontext(stored) as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, delay=2, disable=hidden) as bar,
    ):
        yield cast(BinaryIO, file), lambda: bar.update(stored.tell() - bar.n)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by one JSON object per line, UTF-8; if that fails, the old file stays."""
    write_atomically(path, "".join(map(json_line, rows)))
