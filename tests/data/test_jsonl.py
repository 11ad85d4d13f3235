"""Every defect of a data file is reported by file, line and field."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import read_jsonl, read_objects, write_jsonl


def test_rows_come_with_their_line_numbers(write_rows: Callable[..., Path]) -> None:
    path = write_rows({"a": "x", "b": "y", "extra": 3}, "", {"b": "ü", "a": ""})
    assert list(read_jsonl(path, ("a", "b"))) == [(1, ("x", "y")), (3, ("", "ü"))]


def test_objects_come_whole(write_rows: Callable[..., Path]) -> None:
    rows = [{"a": "x", "extra": {"n": [3, None]}}, {"b": 1.5}]
    assert list(read_objects(write_rows(rows[0], "  ", rows[1]))) == [(1, rows[0]), (3, rows[1])]


def test_gzip_reads_the_same(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    plain = write_rows(*({"a": str(number)} for number in range(500)))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_jsonl(packed, ("a",))) == list(read_jsonl(plain, ("a",)))


def test_unicode_line_separators_do_not_split_rows(tmp_path: Path) -> None:
    rows = [{"a": "one\u2028two\u0085three\nfour"}, {"a": "\U0001f9ed"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [text for _, (text,) in read_jsonl(tmp_path / "rows.jsonl", ("a",))] == [row["a"] for row in rows]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'a': 1}", "not JSON"),
        ("[1]", "JSON object.*list"),
        ('{"b": "x"}', "field 'a' is missing.*the line has: b"),
        ('{"a": 7}', "field 'a' = 7: expected text"),
        ('{"a": null}', "field 'a' = None: expected text"),
        ('{"a": "\\ud800"}', "field 'a' is not valid Unicode"),
        ('{"a": "x", "b": ["y", "\\uDFFF"]}', "field 'b' is not valid Unicode"),  # it could not be written again
        ('{"a": "x", "\\udfff": 1}', r"field '.udfff' is not valid Unicode"),
        ('{"a": "x", "a": "y"}', "field 'a' occurs more than once"),
        ('{"a": "x", "other": 1, "other": 1}', "field 'other' occurs more than once"),
    ],
)
def test_a_bad_line_is_named(write_rows: Callable[..., Path], line: str, complaint: str) -> None:
    path = write_rows({"a": "good"}, line)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: .*{complaint}"):
        list(read_jsonl(path, ("a",)))


@pytest.mark.parametrize("line", [b'{"a": "caf\xe9"}\n', b'{"a": "x", "b": "\xed\xa0\x80"}\n'], ids=["Latin", "half"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: not JSON"):
        list(read_jsonl(path, ("a",)))


def test_a_mark_of_the_byte_order_at_the_beginning_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "x"}\n')
    assert list(read_jsonl(path, ("a",))) == [(1, ("x",))]


@pytest.mark.parametrize("damage", [lambda data: data[:-200], lambda data: b"plain text", lambda data: data[:40] * 3])
def test_a_damaged_archive_is_an_error_not_a_short_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress("".join(f'{{"a": "{n * 7919}"}}\n' for n in range(500)).encode())))
    with pytest.raises(ConfigError, match=r"rows\.jsonl\.gz: damaged archive after line"):
        list(read_jsonl(path, ("a",)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl", ("a",)))
