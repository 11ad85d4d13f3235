"""Folders and shared memory of killed servers are removed by the next one, those of living servers are not; a Triton
that hangs when it starts is started again."""

import fcntl
import logging
import sys
import tempfile
import urllib.request
from pathlib import Path

import psutil
import pytest
from distributed import run_ranks

from nemo_eppo.servers.frontend import Frontend, remove_leftovers


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


def start_with_a_helper_that_hangs(folder: Path) -> tuple[int, list[str]]:
    """Start a Triton whose first helper never does anything; the readiness of the server, and what was said."""
    import pytriton.client.client
    import pytriton.triton

    helper = pytriton.triton.get_stub_path(f"{sys.version_info.major}.{sys.version_info.minor}")
    script = folder / "helper"
    script.write_text(
        f"#!/bin/sh\nif mkdir {folder}/hung 2>/dev/null; then echo $$ > {folder}/hung/pid; exec sleep 600; fi\n"
        f'exec {helper} "$@"\n'
    )
    script.chmod(0o755)
    pytriton.triton.get_stub_path = lambda version: script
    pytriton.client.client.DEFAULT_INFERENCE_TIMEOUT_S = 15.0  # the time that an endpoint has to be loaded; else 60 s
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_eppo").addHandler(handler)
    with (
        Frontend(["status"], lambda name, arrays: {}, "127.0.0.1", 0).running() as url,
        urllib.request.urlopen(f"{url}/v2/health/ready", timeout=30) as ready,
    ):
        return ready.status, said


def test_a_triton_whose_helper_hangs_is_started_again_and_leaves_nothing(tmp_path: Path) -> None:
    [(ready, said)] = run_ranks(start_with_a_helper_that_hangs, 1, tmp_path)
    assert ready == 200
    assert len(said) == 1
    assert "Triton did not start on 127.0.0.1:" in said[0]
    assert "timed out" in said[0]
    assert said[0].endswith("starting it once more")
    pid = int((tmp_path / "hung" / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
