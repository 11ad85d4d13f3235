"""A job of two ranks on this machine: who may join its run directory, who can reach it, and how it ends."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from nemo_eppo.observability.run import LOCK

_SCRIPT = '''
"""Counts to one, and waits for ever."""

import time

import torch.distributed as dist

from nemo_eppo.config import Config
from nemo_eppo.entry.job import job
from nemo_eppo.megatron import runtime
from nemo_eppo.settings.model import ParallelConfig
from nemo_eppo.observability.run import ExpManagerConfig, Run


class CountConfig(Config):
    ranks: int = 1
    exp_manager: ExpManagerConfig = ExpManagerConfig()


@job(CountConfig, config_name="count", config_path="conf")
def main(config: CountConfig, run: Run) -> None:
    runtime.initialize(ParallelConfig(tensor_model_parallel_size=config.ranks), seed=1)
    dist.barrier()
    if run.rank == 0:
        run.open_metrics().log(1, {"count": 1.0})
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
'''


@dataclass(frozen=True)
class Running:
    script: Path
    ranks: list[psutil.Process]
    torchrun: "subprocess.Popen[bytes]"

    @property
    def directory(self) -> Path:
        return self.script.parent / "run"

    def again(self) -> "subprocess.CompletedProcess[str]":
        """The result of the same job once more, in one rank."""
        return subprocess.run(
            [sys.executable, self.script], cwd=self.script.parent, capture_output=True, text=True, timeout=120
        )


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "count.yaml").write_text("ranks: 1\nexp_manager: {explicit_log_dir: run}\n")
    script = tmp_path / "count.py"
    script.write_text(_SCRIPT)
    log, metrics = tmp_path / "output.txt", tmp_path / "run" / "metrics.jsonl"
    with log.open("wb") as output:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "nemo_eppo.entry.torchrun", "--nproc_per_node", "2", str(script), "ranks=2"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            assert torchrun.poll() is None, log.read_text()
            time.sleep(0.2)
        children = psutil.Process(torchrun.pid).children()
        yield Running(script, [child for child in children if str(script) in child.cmdline()], torchrun)
    finally:
        torchrun.kill()
        torchrun.wait()


def test_a_second_start_is_refused_and_an_abandoned_job_ends(running: Running) -> None:
    tree = [psutil.Process(running.torchrun.pid), *psutil.Process(running.torchrun.pid).children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in tree
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}  # the store, and gloo's sockets

    before = {path: path.read_bytes() for path in running.directory.rglob("*") if path.is_file()}
    second = running.again()
    assert second.returncode == 2
    assert f"{running.directory} is in use by another job (host {socket.gethostname()}, process " in second.stderr
    [holder] = [rank for rank in running.ranks if f"process {rank.pid}, started 20" in second.stderr]
    assert "Traceback" not in second.stderr
    assert {path: path.read_bytes() for path in running.directory.rglob("*") if path.is_file()} == before
    assert [json.loads(line)["step"] for line in (running.directory / "metrics.jsonl").open()] == [1]
    assert all(map(_lives, running.ranks))
    assert holder.environ()["RANK"] == "0"

    assert len(running.ranks) == 2
    running.torchrun.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(running.ranks, timeout=5)
    assert not [process for process in left if _lives(process)]
    with (running.directory / LOCK).open("r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # is free


def test_a_rank_whose_torchrun_was_gone_before_it_looked_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    environment = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    program = "from nemo_eppo.entry.torchrun import end_with_torchrun; end_with_torchrun(); print('trains')"
    rank = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (rank.returncode, rank.stdout) == (1, "")
    assert f"torchrun has ended: its store at 127.0.0.1:{port} does not answer" in rank.stderr


_TOLD_TO_END_AT_THE_START = """
import os, signal, time
import torch.multiprocessing
from nemo_eppo.entry.torchrun import run_forked

start = torch.multiprocessing.start_processes

def start_and_be_told(*arguments, **settings):
    started = start(*arguments, **settings)
    os.kill(os.getpid(), signal.SIGTERM)  # nobody knows of the ranks yet
    return started

def wait():
    print(os.getpid(), flush=True)
    time.sleep(100)

torch.multiprocessing.start_processes = start_and_be_told
run_forked(2, wait)
"""


_AND_SO_ARE_THE_RANKS = """
import os, signal
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
"""


_TOLD_TO_END_LATER = """
import os, signal, time
from nemo_eppo.config import RunStopped
from nemo_eppo.entry.job import errors_end_the_job
from nemo_eppo.entry.torchrun import run_forked

def train():
    told = []
    signal.signal(signal.SIGTERM, lambda *about: told.append(about))
    rank = int(os.environ["RANK"])
    with errors_end_the_job(rank):
        print(os.getpid(), flush=True)
        if rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)
        while not told:
            time.sleep(0.1)
        raise RunStopped

run_forked(2, train)
"""


@pytest.mark.parametrize(
    "program",
    [_TOLD_TO_END_AT_THE_START, _AND_SO_ARE_THE_RANKS + _TOLD_TO_END_AT_THE_START, _TOLD_TO_END_LATER],
    ids=["at the start", "ranks too, right after the fork", "later"],
)
def test_a_torchrun_that_is_told_to_end_ends_soon_with_its_ranks(program: str) -> None:
    repository = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=100)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert "forcefully exiting" not in done.stderr  # after 30 seconds
    assert not [pid for pid in done.stdout.split() if psutil.pid_exists(int(pid))]
