"""Where raw rewards come from: reward models, behind servers or in the actor's processes, and Python functions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.rewards.functions import FunctionPool
from nemo_eppo.rewards.inputs import Column
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.client import ClientConfig, RewardClient, Rewards
from nemo_eppo.training.critics import asked

RewardKind = Literal["any", "bradley_terry", "odin", "inform", "warm"]


class RewardAddress(ClientConfig):
    """Where a reward server is found."""

    job: Literal["reward", "critic"] = "reward"
    """The kind of job that serves it: its own, or the critic's."""


class ColocatedRewardConfig(Config):
    """A reward model in the actor's own processes; layout, precision and micro-batches are those of `model`."""

    restore_from_path: Path
    """As model.restore_from_path of a reward job."""


class RewardSourceConfig(Config):
    """One source of reward: exactly one of `server`, `colocated` and `function`."""

    server: RewardAddress | None = None
    """A reward model behind a server."""
    colocated: ColocatedRewardConfig | None = None
    """A reward model in the actor's own processes."""
    function: str | None = None
    """A function "module:name" that takes a nemo_eppo.rewards.sample.Sample and gives a number."""
    weight: float = 1.0
    """Factor of the standardised reward."""
    mean: float | None = None
    """Subtracted from the reward; null for the reward model's own mean on its validation data, 0 for a function."""
    std: float | None = Field(None, gt=0)
    """The reward is divided by it; null for the reward model's own standard deviation, 1 for a function."""

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardSourceConfig":
        if sum(source is not None for source in (self.server, self.colocated, self.function)) != 1:
            raise ValueError("expected exactly one of server, colocated and function")
        return self


class RewardSource(Protocol):
    """One or more columns of raw rewards. All methods are collective over the actor's ranks."""

    columns: list[Column]
    latent_size: int
    """D of the latents that come with the rewards; 0 for none."""

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], Rewards]:
        """Start to compute the rewards of a batch; the function that is returned waits for them, collectively."""

    def close(self) -> None:
        """End what the source holds on this rank."""


class ServerSource:
    """The reward models of one server.

    Raises:
        ServerError: the server is not reachable or does not fit; on every rank, the message names it.
        ConfigError: a reward model is not of the expected kind.
    """

    def __init__(
        self, config: RewardSourceConfig, address: RewardAddress, expect: Mapping[str, Any], kind: RewardKind
    ) -> None:
        self._client = RewardClient(address, address.job)
        model = on_rank0(lambda: self._client.connect(expect)["reward"])
        self.columns = model_columns(config, f"the server at {address.url}", model, kind)
        self.latent_size = int(model.get("latent_size", 0))

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], Rewards]:
        return asked(lambda: self._client.infer(batch.tokens, batch.prompt_lengths, batch.lengths))

    def close(self) -> None:
        self._client.close()


def model_columns(
    config: RewardSourceConfig, where: str, statistics: Mapping[str, Any], kind: RewardKind
) -> list[Column]:
    """The columns of the reward models that a status reply describes by its `statistics`.

    Raises:
        ConfigError: they are not of the expected kind; the message names `where` they are.
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
    """A function of the user, called on rank 0 in the pool's processes."""

    latent_size = 0

    def __init__(self, config: RewardSourceConfig, function: str, pool: FunctionPool) -> None:
        self._function, self._pool = function, pool
        self.columns = [
            Column(name=function, weight=config.weight, mean=config.mean or 0.0, std=config.std or 1.0, is_model=False)
        ]

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], Rewards]:
        wait = asked(lambda: self._pool.submit(self._function, samples))
        return lambda: Rewards(torch.tensor(wait()).unsqueeze(1), torch.zeros(len(samples), 0))

    def close(self) -> None:
        """The pool is closed by who made it."""


class RawRewards(NamedTuple):
    """What all sources say about B responses."""

    scores: Tensor
    """fp32 [B, k], one column per reward model or function."""
    latents: Tensor | None
    """fp32 [B, D], those of several models side by side; None if no model has any."""


class RewardSources:
    """All sources of a run, asked together."""

    def __init__(self, sources: Sequence[RewardSource]) -> None:
        self._sources = sources
        self.columns = [column for source in sources for column in source.columns]
        self.latent_size = sum(source.latent_size for source in sources)

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], RawRewards]:
        """Start to compute the rewards of a batch; the function that is returned waits for them, collectively."""
        pending = [source.ask(batch, samples) for source in self._sources]

        def wait() -> RawRewards:
            rewards = [answer() for answer in pending]
            latents = torch.cat([found.latents for found in rewards], dim=1)
            return RawRewards(
                torch.cat([found.rewards for found in rewards], dim=1), latents if latents.shape[1] else None
            )

        return wait

    def close(self) -> None:
        """End what the sources hold on this rank."""
        for source in self._sources:
            source.close()


def build_source(
    config: RewardSourceConfig, expect: Mapping[str, Any], kind: RewardKind, pool: FunctionPool
) -> RewardSource:
    """The source that the settings name, unless it is colocated; collective."""
    if config.server is not None:
        return ServerSource(config, config.server, expect, kind)
    assert config.function is not None
    return FunctionSource(config, config.function, pool)
