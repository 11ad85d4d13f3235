"""Output that an interrupted command goes on with belongs to one process at a time."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.rows_file import RowsFile


def write_a_row(path: Path, told: Connection) -> None:
    file = RowsFile(path, "generate", {"seed": 1})
    file.begin()
    file.append(['{"row": 0}\n'])
    told.send("written")
    told.recv()


def test_two_processes_do_not_write_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    second = RowsFile(path, "generate", {"seed": 1})
    tell, told = multiprocessing.Pipe()
    first = multiprocessing.get_context("fork").Process(target=write_a_row, args=(path, told))
    first.start()
    assert tell.recv() == "written"
    with pytest.raises(ConfigError, match="is being written by another process"):
        second.begin()
    tell.send("end")
    first.join()
    with pytest.raises(ConfigError, match="has grown meanwhile"):
        second.begin()
    third = RowsFile(path, "generate", {"seed": 1})
    assert third.done == 1
    third.begin()
    third.append(['{"row": 1}\n'])
    assert path.read_text() == '{"row": 0}\n{"row": 1}\n'
