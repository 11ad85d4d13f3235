"""A reward model that training never sees: what it thinks of the rollouts is reported, and watched by the monitor."""

from typing import Any

import torch

from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.client import RewardClient
from nemo_eppo.training.ppo_config import RewardAddress


class HeldOutReward:
    """Collective over the actor's ranks. Raises ServerError if the server is not reachable or does not fit."""

    def __init__(self, address: RewardAddress, expect: dict[str, Any]) -> None:
        self._client = RewardClient(address, address.job)
        self._statistics = on_rank0(lambda: self._client.connect(expect)["reward"])

    def mean(self, batch: RolloutBatch) -> float:
        """The mean score of the responses, standardised; over all models if the server has several."""

        def ask() -> float:
            rewards = self._client.infer(batch.tokens, batch.prompt_lengths, batch.lengths).result().rewards
            mean, std = torch.tensor(self._statistics["mean"]), torch.tensor(self._statistics["std"])
            return ((rewards - mean) / std).mean().item()

        return on_rank0(ask)

    def close(self) -> None:
        """End the client's threads."""
        self._client.close()
