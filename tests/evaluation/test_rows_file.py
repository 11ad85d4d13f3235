"""Output that an interrupted command goes on with belongs to one process at a time."""

from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.rows_file import RowsFile


def test_two_processes_do_not_write_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, second = (RowsFile(path, "generate", {"seed": 1}) for _ in range(2))
    first.begin()
    first.append(['{"row": 0}\n'])
    with pytest.raises(ConfigError, match="is being written by another process"):
        second.begin()
    del first  # it has ended
    with pytest.raises(ConfigError, match="has grown meanwhile"):
        second.begin()
    second._held.close()  # as its process ends
    third = RowsFile(path, "generate", {"seed": 1})
    assert third.done == 1
    third.begin()
    third.append(['{"row": 1}\n'])
    assert path.read_text() == '{"row": 0}\n{"row": 1}\n'
