"""Every part of the GPU suite runs on a CPU at its smallest size; what fails is told and does not stop the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import suite
import torch
from checks import CHECK, FAIL, PASS, agreement
from pairs import Options, Row

HERE = Path(__file__).parent
pytestmark = pytest.mark.gpu


def ran(parts: list[str], output: Path) -> None:
    """Run parts as a user would, and check that they passed and wrote what they found."""
    command = ["bash", str(HERE / "run.sh"), "--smallest", "--rounds", "1", "--output", str(output), "--only", *parts]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.stem for file in output.glob("*.json")) == sorted(parts)
    for part in parts:
        rows = json.loads((output / f"{part}.json").read_text())["rows"]
        assert len(rows) > 1
        assert rows[-1]["what"] == "the part ends"
        assert all(row[CHECK] == PASS for row in rows if CHECK in row), rows
        assert all(f"| {row['what']} |" in (output / f"{part}.md").read_text() for row in rows)
        assert all(json.dumps({"part": part, **row}) in done.stdout for row in rows)


def test_all_parts_but_the_whole_job_pass_on_a_cpu(tmp_path: Path) -> None:
    ran([part for part in suite.PARTS if part != "job"], tmp_path)


@pytest.mark.slow
def test_the_whole_job_passes_on_a_cpu(tmp_path: Path) -> None:
    ran(["job"], tmp_path)


def test_a_part_whose_time_is_over_has_failed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "LIMIT_S", 0.5)
    assert not suite.in_time(
        [sys.executable, "-c", "import time; print('a row', flush=True); time.sleep(60)", "parity"]
    )
    assert capfd.readouterr().out == "a row\nparity: not ended after 0.5 s\n"
    assert not suite.in_time([sys.executable, "-c", "raise SystemExit(1)", "parity"])


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(options: Options) -> Iterator[Row]:
        yield {"what": "first", "seconds": 1.0}
        raise RuntimeError("no more")

    def fails(options: Options) -> Iterator[Row]:
        exact = torch.ones(3)
        yield agreement({"what": "off"}, "fp32", exact + 1e-3, exact, exact)
        yield agreement({"what": "not a number"}, "bf16", exact * torch.nan, exact * 1.01, exact)
        yield agreement({"what": "as the peer"}, "bf16", exact * 0.99, exact * 1.01, exact)

    for name, measure in (("parity", breaks), ("decoder", fails)):
        module = ModuleType(name, "A part.")
        vars(module)["measure"] = measure
        monkeypatch.setitem(sys.modules, name, module)
    arguments = ["--smallest", "--output", str(tmp_path), "--only", "parity", "decoder"]
    monkeypatch.setattr(sys, "argv", ["suite.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 1
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["first", "the part ends"]
    assert (rows[-1]["found"], rows[-1][CHECK]) == ("RuntimeError: no more", FAIL)
    rows = json.loads((tmp_path / "decoder.json").read_text())["rows"]
    assert [row[CHECK] for row in rows] == [FAIL, FAIL, PASS, PASS]
