"""Server and client work for endpoints that they have never heard of: a table of a test's own, over a real Triton."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import free_port

from nemo_eppo.servers.protocol import Array, Arrays, Endpoint, Limits, RequestError, StepRule
from nemo_eppo.servers.server import serve
from nemo_eppo.servers.server_client import ServerClient, ServerUnavailable
from nemo_eppo.servers.service import Tensors
from nemo_eppo.servers.transport import ServerError
from nemo_eppo.settings.servers import ClientConfig, ServerConfig


def positive(arrays: Arrays, limits: Limits) -> None:
    if (arrays["weights"] <= 0).any():
        raise RequestError("weights", arrays["weights"].min(), "numbers > 0")


TABLE = {
    "weigh": Endpoint(
        {"weights": Array(np.float32, ("B",)), "kept": Array(np.uint8, ("B", "N"), torch.bool)},
        {"shares": Array(np.float32, ("B", "N"))},
        check=positive,
    ),
    "count": Endpoint({"by": Array(np.int64, ("1",), torch.int64)}, reply="total", reply_type=int, step=StepRule.NEXT),
    "break": Endpoint({}, reply="total", reply_type=int, step=StepRule.ANY),
}


class Scales:
    name, vocab_size, max_sequence_length = "scales", 1, 1

    def __init__(self) -> None:
        self.step, self.total = 0, 0
        self.endpoints = {"weigh": self.weigh, "count": self.count, "break": self.break_down}

    def weigh(self, request: Tensors) -> Tensors:
        return {"shares": request["weights"][:, None] * request["kept"]}

    def count(self, request: Tensors) -> int:
        self.step, self.total = self.step + 1, self.total + int(request["by"])
        return self.total

    def break_down(self, request: Tensors) -> int:
        return self.total // 0

    def status(self) -> dict[str, Any]:
        return {}


class ScalesClient(ServerClient):
    endpoints = TABLE


def ask(ready: Path, found: list[Any]) -> None:
    """Ask everything of a server once it is ready; the last request ends it."""
    try:
        while not ready.exists():
            time.sleep(0.05)
        url = json.loads(ready.read_text())["url"]
        with ScalesClient("scales", ClientConfig(url=url)) as client:
            client.connect({})
            weights, kept = torch.arange(1.0, 6.0), torch.arange(10).view(5, 2) % 3 == 0
            found.append(client.call("weigh", itemgetter("shares"), weights=weights, kept=kept).result())
            count = {"by": torch.tensor([7]), "step": torch.tensor([1])}
            found.append([client.call("count", itemgetter("total"), **count).result() for _ in range(2)])
            count["step"] = torch.tensor([3])
            for name, wrong in (("weigh", {"weights": -weights, "kept": kept}), ("count", count)):
                try:
                    client.call(name, itemgetter("none"), **wrong).result()
                except ServerError as error:
                    found.append(str(error))
            try:
                client.call("break", itemgetter("total"), step=torch.tensor([1])).result()
            except ServerUnavailable as error:  # as if it had been killed
                found.append(str(error))
    except BaseException:
        os.kill(os.getpid(), signal.SIGTERM)
        raise


def served(ready: Path, port: int) -> list[Any]:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    found: list[Any] = []
    asking = threading.Thread(target=ask, args=(ready, found))
    asking.start()
    with suppress(ZeroDivisionError):
        serve(Scales(), TABLE, ServerConfig(max_batch_size=2, ready_file=ready), group=dist.new_group())
    asking.join()
    return found


@pytest.mark.slow
def test_endpoints_of_any_table_are_served_checked_and_asked(tmp_path: Path) -> None:
    # a process of its own: PyTriton's threads do not survive a fork of one in which other tests have used it
    command = [sys.executable, __file__, str(tmp_path), str(free_port())]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    shares, totals, *wrong = json.loads((tmp_path / "found.json").read_text())
    np.testing.assert_array_equal(shares, [[1, 0], [0, 2], [0, 0], [4, 0], [0, 5]])
    assert totals == [7, 7]
    field, step, broken = wrong
    # the rows make three requests, and which is refused first is chance
    assert re.search(r"weights = -[245]\.0, expected numbers > 0", field)
    assert "step = 3, expected 2: the last applied update is 1" in step
    assert "unavailable for break (step 1): break ended the server; see its log" in broken


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    shares, *rest = served(directory / "ready.json", int(sys.argv[2]))
    (directory / "found.json").write_text(json.dumps([shares.tolist(), *rest]))
