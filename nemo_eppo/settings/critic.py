"""Every setting of the critic, as a job (conf/gpt_ppo_critic.yaml) or in the actor's processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from nemo_eppo.config import Config
from nemo_eppo.settings.model import LoRAConfig, ModelSetup
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.servers import ClientConfig, ServerConfig
from nemo_eppo.settings.training import OptimizerConfig, SavingConfig

SEED = 1234
"""Seed of fresh weights unless a critic job sets another."""


class CriticConfig(Config):
    """The critic job (conf/gpt_ppo_critic.yaml)."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(SEED, ge=0, lt=2**31)
    """Seed of fresh weights."""
    model: ModelSetup
    """Usually the reward model; a language model gets a fresh value head."""
    reward_model: Path | None = None
    """A reward model that this job serves as well, in the critic's layout and precision."""
    value_clip: float | None = Field(0.2, gt=0)
    """Largest distance of a new value from the rollout's before the loss clips it; null for no clipping."""
    optimizer: OptimizerConfig
    checkpoint: SavingConfig = SavingConfig()
    """How checkpoints are written; the actor decides when they are written and which are kept."""
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _decay_has_an_end(self) -> "CriticConfig":
        if self.optimizer.schedule != "constant" and self.optimizer.decay_steps is None:
            raise ValueError(f"optimizer.schedule = '{self.optimizer.schedule}' needs optimizer.decay_steps")
        return self


class ColocatedCriticConfig(Config):
    """A critic in the actor's own processes; layout, precision and micro-batches are those of `model`."""

    restore_from_path: Path
    """Checkpoint, read like model.restore_from_path; usually the reward model. A language model gets a fresh head."""
    value_clip: float | None = Field(0.2, gt=0)
    """Largest distance of a new value from the rollout's before the loss clips it; null for no clipping."""
    optimizer: OptimizerConfig
    """The critic's optimizer; decay_steps may be null for all updates of the run."""
    lora: LoRAConfig | None = None
    """Train adapters beside the critic's frozen weights; null to train all of them."""


class CriticSource(Config):
    """Where the critic runs: exactly one of `server` and `colocated`; a server on this machine if neither is set."""

    server: ClientConfig | None = ClientConfig(url="grpc://127.0.0.1:5555")
    """A critic job behind a server; null for a colocated one."""
    colocated: ColocatedCriticConfig | None = None
    """A critic in the actor's own processes."""
    fresh: bool = False
    """Take a critic that has made updates of another run: its checkpoints are set aside and it begins anew, as a run
    without a checkpoint begins. Otherwise such a critic is refused."""

    @model_validator(mode="before")
    @classmethod
    def _default_gives_way(cls, values: Any) -> Any:
        colocated = isinstance(values, Mapping) and values.get("colocated") is not None
        return {"server": None, **values} if colocated else values

    @model_validator(mode="after")
    def _one_kind(self) -> "CriticSource":
        if (self.server is None) == (self.colocated is None):
            raise ValueError("expected exactly one of server and colocated")
        return self
