"""Rows come the same from every file format, whatever their size; damage is named by file and place."""

import gzip
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow
import pytest
from pyarrow import parquet

from nemo_eppo.config import ConfigError
from nemo_eppo.tools import sources
from nemo_eppo.tools.sources import HubDataset, read_rows

ROWS = [{"n": n, "text": f'é "]," {n}\n' * (n % 7), "nested": [{"a": None}, n / 3]} for n in range(300)]


def fields(path: Path) -> list[object]:
    return [dict(row.fields) for row in read_rows(path)]


@pytest.fixture
def array(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
        return tmp_path / "rows.json"

    return write


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    contents = {
        "a.jsonl": lines,
        "lines.json": b"\n" + lines,
        "array.json": json.dumps(ROWS).encode(),
        "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        assert fields(tmp_path / name) == fields(tmp_path / f"{name}.gz") == ROWS, name
    parquet.write_table(
        pyarrow.Table.from_pylist([{"n": row["n"], "text": row["text"]} for row in ROWS]), tmp_path / "a.parquet"
    )
    assert fields(tmp_path / "a.parquet") == [{"n": row["n"], "text": row["text"]} for row in ROWS]


def test_an_array_may_be_empty(array: Callable[[str], Path]) -> None:
    assert fields(array("[ ] ")) == []


def test_rows_of_an_array_know_their_lines(array: Callable[[str], Path]) -> None:
    path = array('[\n{"a":\n 1},\n\n{"b": 2}, 17, {"c": 3}\n]\n')
    assert [(row.line, row.fields, row.defect) for row in read_rows(path)] == [
        (2, {"a": 1}, ""),
        (5, {"b": 2}, ""),
        (5, {}, "not a JSON object"),
        (5, {"c": 3}, ""),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[\n{"a": 1},\n{"a": ', "damaged JSON array after line 2"),
        ('[{"a": 1}', "damaged JSON array"),
        ('[{"a": 1} {"a": 2}]', "damaged JSON array"),
        ('[{"a": 1}] [2]', "more after the end"),
    ],
)
def test_a_damaged_array_is_an_error_not_a_short_file(array: Callable[[str], Path], text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.json: .*{complaint}"):
        fields(array(text))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_lines_come_before_the_file_is_read_to_its_end(tmp_path: Path, name: str) -> None:
    """A file that is damaged in its third megabyte gives the rows of its first."""
    rows = [{"text": random.Random(n).randbytes(500).hex()} for n in range(3000)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / name).write_bytes((gzip.compress(content) if name.endswith(".gz") else content)[:-200])
    read = read_rows(tmp_path / name)
    assert [row.fields for row in islice(read, 900)] == rows[:900]
    if name.endswith(".gz"):
        with pytest.raises(ConfigError, match="damaged"):
            list(read)
    else:
        assert [row.defect for row in read if row.defect] == ["not JSON"]


def test_a_malformed_line_is_a_row_with_a_defect(write_rows: Callable[..., Path]) -> None:
    rows = list(read_rows(write_rows({"a": 1}, "{'a': 1}", "", "[1]", {"a": 2})))
    assert [(row.line, row.defect) for row in rows] == [(1, ""), (2, "not JSON"), (4, "not a JSON object"), (5, "")]


def test_a_key_that_occurs_twice_is_a_defect_of_its_row(
    write_rows: Callable[..., Path], array: Callable[[str], Path]
) -> None:
    twice = '{"a": 1, "b": {"c": 1, "c": 2}}'
    path = array(f'[{{"a": 1}},\n{twice},\n{{"a": 2}}]')
    for rows in (list(read_rows(write_rows({"a": 1}, twice, {"a": 2}))), list(read_rows(path))):
        assert [(row.line, row.defect) for row in rows] == [
            (1, ""),
            (2, "field 'c' occurs more than once"),
            (3, ""),
        ]


def test_parquet_is_streamed_across_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PARQUET_BATCH", 7)
    table = pyarrow.table({"n": list(range(100))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [(row.line, row.fields["n"]) for row in rows] == [(n + 1, n) for n in range(100)]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "latin.json").write_bytes(b'[{"a": "caf\xe9"}]')
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode())[:-200])
    for name, complaint in [
        ("broken.parquet", "damaged parquet"),
        ("a.csv", "expected .jsonl"),
        ("latin.json", "not UTF-8"),
        ("cut.json.gz", "damaged archive"),
        ("absent.parquet", "no such file"),
        ("absent.json", "no such file"),
    ]:
        with pytest.raises(ConfigError, match=rf"{name}.*{complaint}"):
            fields(tmp_path / name)


def test_hub_data_sets_are_read_by_name_and_split(
    write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory stands for the hub: the library loads it through the same call, without network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "corpus").mkdir()
    write_rows({"prompt": "a"}, {"prompt": "b"}, name="corpus/test.jsonl")
    source = HubDataset(str(tmp_path / "corpus"), split="test")
    assert [(row.line, row.fields) for row in read_rows(source)] == [(1, {"prompt": "a"}), (2, {"prompt": "b"})]


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"data set 'nobody/nothing:train' cannot be loaded.*--input"):
        list(read_rows(HubDataset("nobody/nothing")))
