"""Every defect of a data file is reported by file, line and field; output appears whole or not at all."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import output_directory, read_jsonl, write_jsonl


def test_rows_come_with_their_line_numbers(write_rows: Callable[..., Path]) -> None:
    path = write_rows({"a": "x", "b": "y", "extra": 3}, "", {"b": "ü", "a": ""})
    assert list(read_jsonl(path, ("a", "b"))) == [(1, ("x", "y")), (3, ("", "ü"))]


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
    ],
)
def test_a_bad_line_is_named(write_rows: Callable[..., Path], line: str, complaint: str) -> None:
    path = write_rows({"a": "good"}, line)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: .*{complaint}"):
        list(read_jsonl(path, ("a",)))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"a": "caf\xe9"}\n')
    with pytest.raises(ConfigError, match=r"latin\.jsonl:1: not JSON"):
        list(read_jsonl(path, ("a",)))


@pytest.mark.parametrize("damage", [lambda data: data[:-200], lambda data: b"plain text", lambda data: data[:40] * 3])
def test_a_damaged_archive_is_an_error_not_a_short_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress("".join(f'{{"a": "{n * 7919}"}}\n' for n in range(500)).encode())))
    with pytest.raises(ConfigError, match=r"rows\.jsonl\.gz: damaged archive after line"):
        list(read_jsonl(path, ("a",)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl", ("a",)))


def test_output_directory_gets_everything_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"

    def write(name: str, fails: bool) -> None:
        with output_directory(target) as directory:
            (directory / name).write_text("x")
            assert not (target / name).exists()
            if fails:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write("half", fails=True)
    assert list(target.iterdir()) == []
    write("whole", fails=False)
    assert [entry.name for entry in target.iterdir()] == ["whole"]


def test_output_directory_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"), output_directory(tmp_path):
        pass
    with pytest.raises(ConfigError, match="mine"), output_directory(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_output_directory_takes_over_after_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "stale").write_text("x")
    with output_directory(tmp_path) as directory:
        (directory / "new").write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
