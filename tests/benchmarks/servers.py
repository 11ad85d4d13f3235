"""Round trips to a reward server whose model costs nothing, over size of payload, and the share of serialisation.

`serialise` is everything on the request's way that depends on its size and is no waiting: tensors to arrays, their
check on the server, arrays to a message, the message to bytes and back, arrays to tensors. It is done here in turn with
round trips; its share is that of the CPU seconds that client and server spend in a round trip, with its quartiles.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist
from pairs import Contestant, Options, Row, Spread, interleave, medians
from torch.distributed import HashStore  # type: ignore[attr-defined]
from tritonclient.grpc import service_pb2

from nemo_eppo.servers.client import RewardClient
from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.protocol import Limits
from nemo_eppo.servers.server import serve
from nemo_eppo.servers.service import Tensors
from nemo_eppo.servers.transport import _encode
from nemo_eppo.settings.servers import ClientConfig, ServerConfig

VOCABULARY, LONGEST, ROWS = 32_000, 4096, 4096
PAYLOADS = ((1, 128), (64, 128), (64, 1024), (1024, 1024), (1024, 2048))  # rows, tokens of a row
PORT = 5699


class Zeros:
    """A reward model that gives 0."""

    name, step = "reward", 0
    vocab_size, max_sequence_length = VOCABULARY, LONGEST

    def __init__(self) -> None:
        self.endpoints: dict[str, Callable[[Tensors], Tensors]] = {
            "reward_infer": lambda request: {"rewards": torch.zeros(len(request["tokens"]), 1)}
        }

    def status(self) -> dict[str, object]:
        return {"tokenizer": "none", "reward": {"k": 1, "mean": [0.0], "std": [1.0], "latent_size": 0}}


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    with server() as (config, process), RewardClient(config) as client:
        client.connect({"vocab_size": VOCABULARY, "tokenizer": "none", "max_sequence_length": LONGEST})
        for count, length in PAYLOADS[:1] if options.smallest else PAYLOADS:
            tensors = {
                "tokens": torch.randint(VOCABULARY, (count, length)),
                "prompt_lengths": torch.full((count,), length // 2),
                "lengths": torch.full((count,), length),
            }
            served: list[float] = []
            work: dict[str, Contestant] = {
                "round trip": partial(round_trip, client, tensors, process, served),
                "serialise": partial(serialise, tensors),
            }
            found = interleave(work, options.rounds)
            trips = zip(found["round trip"], served[1:], found["serialise"], strict=True)
            share = Spread.of([serial.cpu / (trip.cpu + there) for trip, there, serial in trips])
            row, mebibytes = medians(found, rows=count, tokens=length)[0], 4 * count * length / 2**20
            row |= {"server cpu s": median(served[1:]), "MiB": mebibytes, "MiB/s": mebibytes / float(row["clock s"])}
            rows.append(row | {"serialise share": share.median, "share q1": share.low, "share q3": share.high})
    return rows


def round_trip(client: RewardClient, tensors: Tensors, process: psutil.Process, served: list[float]) -> None:
    """Ask once, and add the CPU seconds of the server to `served`."""
    before = cpu_seconds(process)
    client.infer(**tensors).result()
    served.append(cpu_seconds(process) - before)


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds so far of a process and its descendants, by the clock of each: clock_getcpuclockid(3)."""
    return sum(time.clock_gettime(~one.pid << 3 | 2) for one in (process, *process.children(recursive=True)))


def serialise(tensors: Tensors) -> None:
    endpoint = ENDPOINTS["reward_infer"]
    arrays = endpoint.encode(tensors)
    raw = _encode("reward_infer", arrays).SerializeToString()
    service_pb2.ModelInferRequest.FromString(raw)
    endpoint.validate(arrays, Limits(VOCABULARY, LONGEST, ROWS))
    endpoint.decode(arrays)


@contextmanager
def server() -> Iterator[tuple[ClientConfig, psutil.Process]]:
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, __file__, str(ready)], env=environment, stdout=subprocess.DEVNULL)
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode} before it was ready")
                time.sleep(0.05)
            yield ClientConfig(url=f"grpc://127.0.0.1:{PORT}"), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    settings = ServerConfig(port=PORT, max_batch_size=ROWS, ready_file=Path(sys.argv[1]))
    serve(Zeros(), ENDPOINTS, settings, group=dist.new_group(backend="gloo"))
