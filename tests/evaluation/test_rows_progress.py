"""Without a terminal, a command says in its log how far it is."""

import logging
import time
from pathlib import Path

import pytest
from distributed import run_ranks

from nemo_eppo.evaluation import rows_progress
from nemo_eppo.evaluation.model_rows import append_rows
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.megatron import runtime
from nemo_eppo.settings.model import ParallelConfig


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def append_slowly(path: Path) -> list[str]:
    """Append the last four of six rows, two in half a second; return what the log says meanwhile."""
    rows_progress._EVERY_S = 0.2
    kept = _Kept()
    rows_progress.logger.addHandler(kept)
    rows_progress.logger.setLevel(logging.INFO)
    runtime.initialize(ParallelConfig(), seed=0)

    def lines(window: slice) -> list[str]:
        time.sleep(0.5)
        return ["{}\n"] * (window.stop - window.start)

    append_rows(RowsFile(path, "score", {}), 6, 2, lines, "responses")
    return kept.said


def test_without_a_terminal_the_log_says_how_many_rows_are_done(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * 2)
    path.with_name("rows.jsonl.settings.json").write_text("{}")
    of_rank_0, of_rank_1 = run_ranks(append_slowly, 2, path)
    assert of_rank_0[0] == "responses: 2 of 6 rows are done, 0:00 since the start"
    assert any(said.startswith("responses: 4 of 6 rows are done") for said in of_rank_0)
    assert of_rank_1 == []


def test_a_bar_on_a_terminal_needs_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows_progress, "_EVERY_S", 0.05)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with caplog.at_level(logging.INFO), rows_progress.rows_progress(3, unit="answer") as add:
        add(2)
        time.sleep(0.2)
    assert "2/3 [" in capsys.readouterr().err
    assert caplog.messages == []
