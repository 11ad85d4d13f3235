"""A server with a tiny model on two ranks, for the tests; `server_process.py` starts it.

The model is an embedding [VOCAB] whose halves lie on the two ranks, and a bias that training moves.
A first token >= VOCAB - 4 asks for misbehaviour.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.protocol import ServiceError
from nemo_eppo.servers.server import serve
from nemo_eppo.servers.service import Tensors
from nemo_eppo.settings.servers import ServerConfig

VOCAB, MAX_LENGTH, MAX_BATCH = 64, 4096, 8
EXPECT = {"vocab_size": VOCAB, "tokenizer": "tiny", "max_sequence_length": 1024}
"""What a client compares the server's status with."""
FAIL, FAIL_ON_ONE_RANK, NAN, SLEEP = range(VOCAB - 4, VOCAB)


def embedding() -> torch.Tensor:
    return torch.linspace(-1, 1, VOCAB)


class TinyService:
    name = "critic"
    vocab_size = VOCAB
    max_sequence_length = MAX_LENGTH

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.step, self.calls, self.bias = 0, 0, 0.0
        self.endpoints: dict[str, Callable[[Tensors], Any]] = {
            "critic_infer": self.infer,
            "critic_train": self.train,
            "critic_save": lambda arrays: f"checkpoints/step_{self.step} and {arrays['keep'].tolist()}",
            "reward_infer": self.reward,
        }
        pids: list[Any] = [None] * self.world
        dist.all_gather_object(pids, os.getpid())
        self.pids = pids

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] tokens to [B, S] floats; every rank knows its own part of the vocabulary only."""
        self.calls += 1
        if tokens[0, 0] == FAIL or (tokens[0, 0] == FAIL_ON_ONE_RANK and self.rank == 1):
            raise ServiceError("non-finite loss")
        mine = tokens % self.world == self.rank
        out = torch.where(mine, embedding()[tokens], 0.0)
        if tokens[0, 0] == SLEEP:
            time.sleep(int(tokens[0, 1]))
        dist.all_reduce(out)
        calls = torch.tensor([self.calls, -self.calls])
        dist.all_reduce(calls, dist.ReduceOp.MAX)
        assert calls.sum() == 0, "the ranks are out of step"
        return out

    def infer(self, arrays: Tensors) -> Tensors:
        values = self.embed(arrays["tokens"])[:, 1:] + self.bias
        if arrays["tokens"][0, 0] == NAN:
            values[2, 5] = torch.nan
        return {"values": values.T.contiguous().T}  # not C-contiguous

    def train(self, arrays: Tensors) -> dict[str, float]:
        assert arrays["mask"].dtype == torch.bool
        error = arrays["returns"] - self.embed(arrays["tokens"])[:, 1:] - self.bias
        self.bias += float(error[arrays["mask"]].mean())
        self.step += 1
        return {"critic/loss": float(error[arrays["mask"]].square().mean()), "bias": self.bias}

    def reward(self, arrays: Tensors) -> Tensors:
        tokens, start, end = arrays["tokens"], arrays["prompt_lengths"], arrays["lengths"]
        positions = torch.arange(tokens.shape[1])
        response = (positions >= start[:, None]) & (positions < end[:, None])
        score = torch.where(response, self.embed(tokens), 0.0).sum(1)
        return {"rewards": torch.stack([score, -score], 1), "latents": torch.zeros(len(tokens), 0)}

    def status(self) -> dict[str, Any]:
        return {
            "tokenizer": "tiny",
            "reward": {"k": 2, "mean": [0.0, 0.0], "std": [1.0, 1.0], "latent_size": 0},
            "pids": self.pids,
            "calls": self.calls,
            "bias": self.bias,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = ServerConfig(certificates=Path(sys.argv[2]), max_batch_size=MAX_BATCH, ready_file=Path(sys.argv[1]))
    serve(TinyService(), ENDPOINTS, config, group=dist.new_group(backend="gloo"))
    dist.destroy_process_group()
