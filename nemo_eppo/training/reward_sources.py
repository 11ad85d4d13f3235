"""Sources of raw rewards: reward models, behind servers or in the actor's processes, and Python functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.rewards.functions import FunctionPool
from nemo_eppo.rewards.inputs import Column
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.client import RewardClient, Rewards
from nemo_eppo.settings.rewards import RewardAddress, RewardKind, RewardSourceConfig
from nemo_eppo.training.critics import request_from_rank0


class RewardSource(Protocol):
    """One or more columns of raw rewards. All methods are collective over the actor's ranks."""

    columns: list[Column]
    latent_size: int
    """Size D of the latents that come with the rewards; 0 for none."""

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], Rewards]:
        """Start to compute the rewards of a batch; the returned function waits for them and is collective."""

    def close(self) -> None:
        """Release what the source holds on this rank."""


class ServerSource:
    """The reward models of one server.

    Raises:
        ServerError: the server is not reachable or does not fit; raised on every rank, and names the server.
        ConfigError: a reward model is not of the expected kind.
    """

    def __init__(
        self, config: RewardSourceConfig, address: RewardAddress, expect: Mapping[str, Any], kind: RewardKind
    ) -> None:
        self.client = RewardClient(address, address.job, address.others)
        self._expect: dict[str, Any] = dict(expect)
        self.statistics = self.connect()
        """Statistics of the server's models, which identify them: no two models have the same."""
        self._expect["reward"] = self.statistics  # after a reconnection it has to be the same model
        self.columns = model_columns(config, f"the server at {address.url}", self.statistics, kind)
        self.latent_size = int(self.statistics["latent_size"])

    def connect(self) -> dict[str, Any]:
        """Wait until the server answers, check that it fits, and return its models' statistics; collective."""
        model: dict[str, Any] = on_rank0(lambda: self.client.connect(self._expect)["reward"])
        return model

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], Rewards]:
        return request_from_rank0(lambda: self.client.infer(batch.tokens, batch.prompt_lengths, batch.lengths))

    def close(self) -> None:
        self.client.close()


def model_columns(
    config: RewardSourceConfig, where: str, statistics: Mapping[str, Any], kind: RewardKind
) -> list[Column]:
    """Return the columns of the reward models that the `statistics` of a status reply describe.

    Raises:
        ConfigError: they are not of the expected kind; the message says `where` they are.
    """
    if kind not in ("any", statistics.get("kind")):
        raise ConfigError(f"reward_kind = '{kind}', but {where} has a reward model of kind '{statistics.get('kind')}'")
    return [
        Column(
            name=f"the reward model of {where}",
            weight=config.weight,
            mean=mean if config.mean is None else config.mean,
            std=std if config.std is None else config.std,
        )
        for mean, std in zip(statistics["mean"], statistics["std"], strict=True)
    ]


class FunctionSource:
    """A user's reward function; rank 0 submits it to the pool of processes."""

    latent_size = 0

    def __init__(self, config: RewardSourceConfig, function: str, pool: FunctionPool) -> None:
        self._function, self._pool = function, pool
        self.columns = [
            Column(name=function, weight=config.weight, mean=config.mean or 0.0, std=config.std or 1.0, is_model=False)
        ]

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], Rewards]:
        wait = request_from_rank0(lambda: self._pool.submit(self._function, samples))
        return lambda: Rewards(torch.tensor(wait()).unsqueeze(1), torch.zeros(len(samples), 0))

    def close(self) -> None:
        """Nothing is held; the pool is closed by its owner."""


class RawRewards(NamedTuple):
    """Answers of all sources for B responses."""

    scores: Tensor
    """Raw rewards fp32 [B, k], one column per reward model or function."""
    latents: Tensor | None
    """Latents fp32 [B, D], those of several models side by side; None if no model has any."""


class RewardSources:
    """Several sources that are asked together."""

    def __init__(self, sources: Sequence[RewardSource]) -> None:
        self._sources = sources
        self.remotes = [source for source in sources if isinstance(source, ServerSource)]
        self.columns = [column for source in sources for column in source.columns]
        self.latent_size = sum(source.latent_size for source in sources)

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], RawRewards]:
        """Start to compute the rewards of a batch; the returned function waits for them and is collective."""
        pending = [source.ask(batch, samples) for source in self._sources]

        def wait() -> RawRewards:
            rewards = [receive() for receive in pending]
            scores = torch.cat([answer.rewards for answer in rewards], dim=1)
            latents = torch.cat([answer.latents for answer in rewards], dim=1)
            return RawRewards(scores, latents if latents.shape[1] else None)

        return wait

    def close(self) -> None:
        """Release what the sources hold on this rank."""
        for source in self._sources:
            source.close()


def build_source(
    config: RewardSourceConfig, expect: Mapping[str, Any], kind: RewardKind, pool: FunctionPool
) -> RewardSource:
    """Connect to the server or wrap the function that the settings name; collective. Not for a colocated source."""
    if config.server is not None:
        return ServerSource(config, config.server, expect, kind)
    assert config.function is not None
    return FunctionSource(config, config.function, pool)
