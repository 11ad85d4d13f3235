"""Round trips to a reward server whose model costs nothing, over size of payload, and the share of serialisation.

`serialise` is everything on the request's way that depends on its size and is no waiting: tensors to arrays, their
check on the server, arrays to a message, the message to bytes and back, arrays to tensors. It is measured alone, once.
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

import torch
import torch.distributed as dist
from pairs import Contestant, Options, Row, interleave, medians
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
    with server() as config, RewardClient(config) as client:
        client.connect({"vocab_size": VOCABULARY, "tokenizer": "none", "max_sequence_length": LONGEST})
        for count, length in PAYLOADS[:1] if options.smallest else PAYLOADS:
            tensors = {
                "tokens": torch.randint(VOCABULARY, (count, length)),
                "prompt_lengths": torch.full((count,), length // 2),
                "lengths": torch.full((count,), length),
            }
            work: dict[str, Contestant] = {
                "round trip": partial(round_trip, client, tensors),
                "serialise": partial(serialise, tensors),
            }
            trip, serial = medians(interleave(work, options.rounds), rows=count, tokens=length)
            seconds, mebibytes = float(trip["clock s"]), 4 * count * length / 2**20
            share = float(serial["clock s"]) / seconds
            rows.append(trip | {"MiB": mebibytes, "MiB/s": mebibytes / seconds, "serialise share": share})
    return rows


def round_trip(client: RewardClient, tensors: Tensors) -> None:
    client.infer(**tensors).result()


def serialise(tensors: Tensors) -> None:
    endpoint = ENDPOINTS["reward_infer"]
    arrays = endpoint.encode(tensors)
    raw = _encode("reward_infer", arrays).SerializeToString()
    service_pb2.ModelInferRequest.FromString(raw)
    endpoint.validate(arrays, Limits(VOCABULARY, LONGEST, ROWS))
    endpoint.decode(arrays)


@contextmanager
def server() -> Iterator[ClientConfig]:
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, __file__, str(ready)], env=environment, stdout=subprocess.DEVNULL)
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode} before it was ready")
                time.sleep(0.05)
            yield ClientConfig(url=f"grpc://127.0.0.1:{PORT}")
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    settings = ServerConfig(port=PORT, max_batch_size=ROWS, ready_file=Path(sys.argv[1]))
    serve(Zeros(), ENDPOINTS, settings, group=dist.new_group(backend="gloo"))
