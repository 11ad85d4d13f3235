"""The actor's side of the critic and reward servers: rank 0 asks, every rank hears the answer."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.client import CriticClient, RewardClient, Rewards
from nemo_eppo.training.ppo_config import ServersConfig


@dataclass(frozen=True)
class RewardStatistics:
    """What the reward models say about themselves."""

    mean: Tensor
    """[k] each model's mean score on its validation data."""
    std: Tensor
    """[k] likewise its standard deviation."""
    latent_size: int
    """D, the latents of all models together; 0 for none."""


class Answers(NamedTuple):
    """What the servers say about a rollout batch."""

    scores: Tensor
    """[B, k]."""
    latents: Tensor | None
    """[B, D], those of several models side by side."""
    values: Tensor | None
    """[B, T], or [B, T + 1] with bootstrap, if they were asked."""


@dataclass
class Pending:
    """Requests under way; empty on all ranks but 0."""

    values: "Future[Tensor] | None" = None
    rewards: "list[Future[Rewards]] | None" = None


class RemoteModels:
    """Critic and reward models behind their servers. All methods are collective over the actor's ranks.

    Args:
        expect: status entries that all servers must agree with (tokenizer digest, sequence limit).
        mini_batch_size: samples of an update, which the critic takes whole.

    Raises:
        ServerError: a server is not reachable or does not fit; on every rank, the message names it.
        ConfigError: a reward model is not of the kind that the settings expect.
    """

    def __init__(self, config: ServersConfig, expect: dict[str, Any], mini_batch_size: int) -> None:
        self.critic = CriticClient(config.critic)
        self.rewards = [RewardClient(address, address.job) for address in config.rewards]
        critic, models = on_rank0(
            lambda: (
                self.critic.connect(expect | {"max_batch_size": mini_batch_size}),
                [client.connect(expect)["reward"] for client in self.rewards],
            )
        )
        self.updates = int(critic["step"])
        self.statistics = RewardStatistics(
            mean=torch.tensor([value for model in models for value in model["mean"]]),
            std=torch.tensor([value for model in models for value in model["std"]]),
            latent_size=sum(model.get("latent_size", 0) for model in models),
        )
        for address, model in zip(config.rewards, models, strict=True):
            if config.reward_kind not in ("any", model.get("kind")):
                raise ConfigError(
                    f"servers.reward_kind = '{config.reward_kind}', but the server at {address.url} has a reward model "
                    f"of kind '{model.get('kind')}'"
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

    def collect(self, pending: Pending) -> Answers:
        """Wait for the answers."""

        def wait() -> Answers:
            models = [future.result() for future in pending.rewards or []]
            latents = torch.cat([model.latents for model in models], dim=1)
            return Answers(
                torch.cat([model.rewards for model in models], dim=1),
                latents if latents.shape[1] else None,
                pending.values.result() if pending.values else None,
            )

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

    def begin(self, run: int, updates: int) -> None:
        """Have the critic stand where this run begins or goes on: after so many updates.

        Raises:
            ServerError: the critic belongs to another run, or has no checkpoint to go back to.
        """
        self.updates = on_rank0(lambda: self.critic.begin(run, updates).result())

    def save(self, keep: Sequence[int]) -> str:
        """Have the critic start to save itself, and drop its checkpoints but those of the updates `keep`; the path that
        the new one will have on the server."""
        return on_rank0(lambda: self.critic.save(self.updates, keep).result())

    def close(self) -> None:
        """End the clients' threads."""
        for client in (self.critic, *self.rewards):
            client.close()
