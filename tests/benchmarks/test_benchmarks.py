"""Every benchmark runs, at its smallest size, and writes its numbers; their values are not looked at."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
SHARED = {"pairs", "networks", "__main__", "test_benchmarks", "test_counts"}
NAMES = {file.stem for file in HERE.glob("*.py")} - SHARED
STARTS_JOBS = {"cost_model", "quickstart_run", "servers", "startup", "step", "trl_ppo"}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(NAMES - STARTS_JOBS, id="in one process"),
        pytest.param(STARTS_JOBS, id="that start jobs"),
    ],
)
def test_benchmarks_write_their_numbers(names: set[str], tmp_path: Path) -> None:
    options = ["--smallest", "--rounds", "1", "--threads", "1", "--output", str(tmp_path), "--only", *sorted(names)]
    options += ["--against", str(CHECKOUT)]
    done = subprocess.run([sys.executable, str(HERE), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.stem for file in tmp_path.glob("*.json")} == names
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["benchmark"] == name
        assert found["rows"], name
        for row in found["rows"]:
            numbers = [value for value in row.values() if not isinstance(value, str)]
            assert numbers, f"{name}: {row}"
            assert all(map(math.isfinite, numbers)), f"{name}: {row}"
        table = (tmp_path / f"{name}.md").read_text()
        assert all(f"| {row['what']} |" in table for row in found["rows"])
