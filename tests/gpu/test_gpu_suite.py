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
from pairs import Options, Row, write

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


def test_the_whole_job_passes_on_a_cpu(tmp_path: Path) -> None:
    ran(["job"], tmp_path)


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


def test_a_part_whose_time_is_over_is_ended_with_what_it_has_started_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    write(tmp_path, "job", "A part.", [{"what": "first", CHECK: PASS}], 1)
    monkeypatch.setattr(suite, "LIMIT_S", 3)
    assert not suite.in_time([sys.executable, str(hangs), "job"], tmp_path)
    rows = json.loads((tmp_path / "job.json").read_text())["rows"]
    assert [(row["what"], row[CHECK]) for row in rows] == [("first", PASS), ("the part ends", FAIL)]
    assert "not ended after 3 s" in (tmp_path / "job.md").read_text()
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("ends", "rows"),
    [("os._exit(1)", None), ("os.kill(os.getpid(), 9)", ["exit status -9"])],
    ids=["its rows say so", "killed"],
)
def test_a_part_that_ends_otherwise_has_failed(ends: str, rows: list[str] | None, tmp_path: Path) -> None:
    assert not suite.in_time([sys.executable, "-c", f"import os; {ends}", "training"], tmp_path)
    file = tmp_path / "training.json"
    assert file.exists() == (rows is not None)
    if rows:
        assert [row["found"] for row in json.loads(file.read_text())["rows"]] == rows
