"""Start the tiny server on two ranks, as a launch does."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from jobs import nursery

from nemo_eppo.launch.nursery import ForkedJob
from nemo_eppo.servers.certificates import create
from nemo_eppo.servers.frontend import remove_leftovers
from nemo_eppo.settings.servers import ClientConfig

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    torchrun: ForkedJob
    url: str
    ready_file: Path
    output: Path
    certificates: Path

    @property
    def client_config(self) -> ClientConfig:
        return ClientConfig(url=self.url, certificates=self.certificates, connect_timeout=60)

    def processes(self) -> list[psutil.Process]:
        """torchrun, the ranks, Triton and its stubs."""
        parent = psutil.Process(self.torchrun.pid)
        return [parent, *parent.children(recursive=True)]


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    ready, output = folder / "ready.json", folder / "output.txt"
    certificates = folder / "certificates of a run"  # a path with blanks
    create(certificates)
    script = str(ROOT / "tests/servers/tiny_server.py")
    torchrun = nursery().start([script, str(ready), str(certificates)], 2, output)
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert torchrun.poll() is None, output.read_text()
            assert time.monotonic() < deadline, f"not ready after 120 s:\n{output.read_text()}"
            time.sleep(0.05)
        server = Server(torchrun, json.loads(ready.read_text())["url"], ready, output, certificates)
        started = server.processes()
        yield server
    finally:
        for process in [*started, torchrun]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started)
        remove_leftovers()
