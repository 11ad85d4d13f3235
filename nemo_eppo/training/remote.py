"""The actor's side of the critic and reward servers: rank 0 asks, every rank hears the answer."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.client import CriticClient, RewardClient, Rewards
from nemo_eppo.training.collectives import on_rank0
from nemo_eppo.training.ppo_config import ServersConfig


@dataclass(frozen=True)
class RewardStatistics:
    """Validation mean and standard deviation of each reward model, [k]."""

    mean: Tensor
    std: Tensor


@dataclass
class Pending:
    """Requests under way; empty on all ranks but 0."""

    values: "Future[Tensor] | None" = None
    rewards: "list[Future[Rewards]] | None" = None


class RemoteModels:
    """Critic and reward models behind their servers. All methods are collective over the actor's ranks.

    Args:
        expect: status entries that all servers must agree with (tokenizer digest, sequence limit).

    Raises:
        ServerError: a server is not reachable or does not fit; on every rank, the message names it.
    """

    def __init__(self, config: ServersConfig, expect: dict[str, Any]) -> None:
        self.critic = CriticClient(config.critic)
        self.rewards = [RewardClient(address, address.job) for address in config.rewards]
        critic, models = on_rank0(
            lambda: (self.critic.connect(expect), [client.connect(expect)["reward"] for client in self.rewards])
        )
        self.updates = int(critic["step"])
        self.statistics = RewardStatistics(
            mean=torch.tensor([value for model in models for value in model["mean"]]),
            std=torch.tensor([value for model in models for value in model["std"]]),
        )

    def ask(self, batch: RolloutBatch, *, values: bool = True, bootstrap: bool = False) -> Pending:
        """Send the rollout to the servers and return at once.

        Args:
            values: also ask the critic.
            bootstrap: ask for the value after the last token too, as one more column.
        """
        if dist.get_rank():
            return Pending()
        pending = Pending(
            rewards=[client.infer(batch.tokens, batch.prompt_lengths, batch.lengths) for client in self.rewards]
        )
        if values:
            padded = batch.with_padding(batch.sequence_length + 1) if bootstrap else batch
            pending.values = self.critic.infer(padded.tokens, padded.lengths)
        return pending

    def collect(self, pending: Pending) -> tuple[Tensor, Tensor | None]:
        """Wait for the answers: scores [B, k], and values [B, T] (or [B, T + 1] with bootstrap) if they were asked."""

        def wait() -> tuple[Tensor, Tensor | None]:
            scores = torch.cat([future.result().rewards for future in pending.rewards or []], dim=1)
            return scores, pending.values.result() if pending.values else None

        return on_rank0(wait)

    def train(self, batch: RolloutBatch, returns: Tensor, values: Tensor) -> "Future[dict[str, float]] | None":
        """Start the critic's next update on a mini-batch; `finish` waits for it."""
        self.updates += 1
        if dist.get_rank():
            return None
        return self.critic.train(batch.tokens, batch.lengths, returns, values, batch.mask, self.updates)

    def finish(self, update: "Future[dict[str, float]] | None") -> dict[str, float]:
        """The metrics of an update that `train` started."""
        return on_rank0(lambda: update.result() if update else {})

    def save(self) -> str:
        """Have the critic save itself; its path on the server."""
        return on_rank0(lambda: self.critic.save(self.updates).result())

    def close(self) -> None:
        """End the clients' threads."""
        for client in (self.critic, *self.rewards):
            client.close()
