"""The table of job kinds: what other rooms know about the scripts in examples/nlp/gpt. A new script is a new entry."""

from dataclasses import dataclass
from typing import Literal

from nemo_eppo.config import Config
from nemo_eppo.settings.critic import CriticConfig
from nemo_eppo.settings.model import Head
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reference_energies import ReferenceEnergiesConfig
from nemo_eppo.settings.reward_model import RewardServerConfig, RewardTrainingConfig
from nemo_eppo.settings.training import SFTConfig


@dataclass(frozen=True)
class JobKind:
    """What is known about one job script."""

    config_name: str
    """Name of its YAML file in conf/, without the ending."""
    schema: type[Config]
    """Class of its settings."""
    head: Head
    """Output layer of its model: "lm" gives logits, "scalar" stands for any head of a reward model or critic."""
    starts_from: Head | None = None
    """Head that its checkpoint must have; None if a language model gets a fresh head."""
    serves: Literal["critic", "reward"] | None = None
    """What it serves until it is stopped; None for a job that ends by itself."""
    samples: bool = False
    """Whether it samples rollouts, sends them to critic and reward servers, and keeps a frozen copy of its model."""
    row_fields: tuple[str, ...] = ()
    """Names of the text fields of its data rows, the prompt first; empty if it reads no data."""
    rows_per_step: str | None = None
    """Key of the setting that says how many rows a step takes; None if none have to fill one."""

    @property
    def sequences_per_row(self) -> int:
        """Number of sequences that one row adds to a forward pass: two for a preference pair, otherwise one."""
        return max(1, len(self.row_fields) - 1)


KINDS = {
    "train_gpt_sft": JobKind(
        "gpt_sft",
        SFTConfig,
        head="lm",
        starts_from="lm",
        row_fields=("prompt", "response"),
        rows_per_step="fit.global_batch_size",
    ),
    "train_reward_model": JobKind(
        "gpt_reward_model",
        RewardTrainingConfig,
        head="scalar",
        row_fields=("prompt", "chosen", "rejected"),
        rows_per_step="fit.global_batch_size",
    ),
    "serve_reward_model": JobKind(
        "serve_reward_model",
        RewardServerConfig,
        head="scalar",
        starts_from="scalar",
        serves="reward",
    ),
    "serve_ppo_critic": JobKind("gpt_ppo_critic", CriticConfig, head="scalar", serves="critic"),
    "train_gpt_ppo_actor": JobKind(
        "gpt_ppo_actor",
        PPOConfig,
        head="lm",
        starts_from="lm",
        samples=True,
        row_fields=("prompt",),
        rows_per_step="ppo.rollout_batch_size",
    ),
    "read_reference_energies": JobKind(
        "gpt_reference_energies",
        ReferenceEnergiesConfig,
        head="lm",
        starts_from="lm",
        row_fields=("prompt",),
    ),
}
"""Job kinds by the name of their script, without its ending."""
