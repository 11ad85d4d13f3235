"""Folders and shared memory of killed servers are removed by the next one, those of living servers are not; a Triton
that hangs when it starts is started again."""

import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from nemo_eppo.servers.frontend import remove_leftovers


def test_leftovers_are_removed_only_when_their_owner_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocks = {}
    for name in ("dead", "living", "starting"):
        folder = tmp_path / f"nemo_eppo_triton_{name}"
        folder.mkdir()
        prefix = "" if name == "starting" else f"nemo_eppo_test_{tmp_path.name}_{name}"
        (folder / "owner").write_text(prefix)
        blocks[name] = Path("/dev/shm") / f"{prefix or 'nemo_eppo_test_' + tmp_path.name}_block"
        blocks[name].touch()
    try:
        with open(tmp_path / "nemo_eppo_triton_living" / "owner") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            remove_leftovers()
        assert {path.name for path in tmp_path.iterdir()} == {"nemo_eppo_triton_living", "nemo_eppo_triton_starting"}
        assert [name for name, block in blocks.items() if block.exists()] == ["living", "starting"]
    finally:
        for block in blocks.values():
            block.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_triton_whose_helper_hangs_is_started_again_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("hanging_triton.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    assert done.stderr.count("nemo_eppo.servers.frontend: Triton did not start on 127.0.0.1:") == 1
    assert "not ready after 20 s" in done.stderr
    assert "starting it once more" in done.stderr
    pid = int((tmp_path / "hung" / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
