"""Recorded rollouts."""

import json
import math
from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.observability.recorder import read_rows, record, recorded_steps

ROW = {"prompt": "a\u2028b\n\u00e9", "response": "c", "reward": -0.25, "terms": {"kl": [0.0, 1.0]}, "gold_reward": None}


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = record(tmp_path / "rollouts", 123, [ROW, {**ROW, "prompt": "x"}])
    assert path == tmp_path / "rollouts" / "step_000123.jsonl"
    assert read_rows(path) == [ROW, {**ROW, "prompt": "x"}]
    assert [json.loads(line) for line in path.open(encoding="utf-8", newline="\n")] == read_rows(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"n": 1, "n": 2}\n', "field 'n' occurs more than once"), ('{"n": ', "not JSON"), ("[1]\n", "not a JSON object")],
)
def test_a_damaged_row_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = record(tmp_path, 1, [{"n": 1}])
    path.write_text(path.read_text() + line)
    with pytest.raises(ConfigError, match=rf"step_000001\.jsonl:2: {said}"):
        read_rows(path)


def test_steps_are_found_in_order(tmp_path: Path) -> None:
    for step in (1_000_000, 20, 0):
        record(tmp_path, step, [])
    assert list(recorded_steps(tmp_path)) == [0, 20, 1_000_000]


def test_a_step_is_replaced_as_a_whole(tmp_path: Path) -> None:
    record(tmp_path, 1, [{"n": 1}, {"n": 2}])
    with pytest.raises(ValueError, match="step 1, row 1, column 'energy'"):
        record(tmp_path, 1, [{"n": 3}, {"n": 4, "energy": math.nan}])
    assert read_rows(tmp_path / "step_000001.jsonl") == [{"n": 1}, {"n": 2}]
    record(tmp_path, 1, [{"n": 5}])
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001.jsonl"]
    assert read_rows(tmp_path / "step_000001.jsonl") == [{"n": 5}]


def test_a_value_that_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step 9, row 0, column 'tokens' cannot be recorded"):
        record(tmp_path, 9, [{"prompt": "p", "tokens": {1, 2}}])
