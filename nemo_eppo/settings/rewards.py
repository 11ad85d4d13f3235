"""Sources of reward."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nemo_eppo.config import Config
from nemo_eppo.settings.servers import Address, ClientConfig


class FunctionsConfig(Config):
    """The processes that reward functions run in."""

    workers: int = Field(1, ge=1)
    """Number of processes, on the machine of rank 0; each takes one response at a time."""
    time_limit: float = Field(60.0, gt=0)
    """Seconds that one call may take. A call that takes longer is an error, which ends the run."""


RewardKind = Literal["any", "bradley_terry", "odin", "inform", "warm"]


class RewardAddress(ClientConfig):
    """Address of a reward server."""

    job: Literal["reward", "critic"] = "reward"
    """Kind of job that serves it: a reward job, or the critic's."""
    others: tuple[Address, ...] = ()
    """Addresses of further servers of the same model: requests are shared, and a lost server's go to the others."""


class ColocatedRewardConfig(Config):
    """A reward model in the actor's own processes; layout, precision and micro-batches are those of `model`."""

    restore_from_path: Path
    """Reward model, read like model.restore_from_path of a reward job."""


class RewardSourceConfig(Config):
    """One source of reward: exactly one of `server`, `colocated` and `function`."""

    server: RewardAddress | None = None
    """A reward model behind a server; null for another source."""
    colocated: ColocatedRewardConfig | None = None
    """A reward model in the actor's own processes; null for another source."""
    function: str | None = None
    """Function "module:name" that takes a nemo_eppo.rewards.sample.Sample and returns a number; null for none."""
    weight: float = 1.0
    """Weight of the standardised reward; 1 for the reward models of shaping.combine wco and uwo."""
    mean: float | None = None
    """Number subtracted from the reward; null for a reward model's mean on its validation data, 0 for a function."""
    std: float | None = Field(None, gt=0)
    """Number the reward is divided by; null for a reward model's standard deviation there, 1 for a function."""

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardSourceConfig":
        if sum(source is not None for source in (self.server, self.colocated, self.function)) != 1:
            raise ValueError("expected exactly one of server, colocated and function")
        return self
