"""Every setting of the PPO actor job (conf/gpt_ppo_actor.yaml)."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nemo_eppo.algorithms.energy import EnergyWindow
from nemo_eppo.algorithms.policy import Aggregation
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.generation.build import EngineConfig
from nemo_eppo.megatron.energy import EnergyProbeConfig
from nemo_eppo.megatron.optimizer import OptimizerConfig
from nemo_eppo.megatron.saving import CheckpointConfig
from nemo_eppo.models.model_config import ModelConfig
from nemo_eppo.monitor.monitor import MonitorConfig
from nemo_eppo.observability.run import ExpManagerConfig
from nemo_eppo.rewards.pipeline import RewardConfig
from nemo_eppo.rewards.terms import EnergyPenaltyConfig
from nemo_eppo.rollout.sampling import SamplingParams
from nemo_eppo.servers.client import ClientConfig
from nemo_eppo.training.setup import ModelSetup


class EnergyConfig(EnergyPenaltyConfig, EnergyProbeConfig):
    """The energy-loss penalty that makes PPO into EPPO (arXiv 2501.19358), and how energy is read."""

    reference: Literal["own_response", "same_response"] = "own_response"
    """What the SFT model's energy loss is read on: its own greedy answer to the prompt (paper; computed once per
    prompt), or the policy's answer (no generation; rides on the reference's log-prob pass)."""
    window: EnergyWindow = "response"
    """Which hidden states count: at the response tokens, or (generating) one position earlier."""
    cache: Path | None = None
    """Directory of the SFT model's answers and energies, which runs can share; null for <run directory>/energy_cache.
    A change of model, tokenizer, generation or energy settings never finds old entries."""
    max_tokens: int | None = Field(None, ge=1)
    """Only the first so many response tokens count (authors: 1024); null for all."""

    @model_validator(mode="after")
    def _window_is_independent_of_padding(self) -> "EnergyConfig":
        if self.window == "official_trainer":
            raise ValueError("window 'official_trainer' depends on how a batch is padded and cannot be trained on")
        return self


class PPOSettings(RewardConfig):
    """The algorithm, and how its reward is composed."""

    max_steps: int = Field(ge=1)
    """PPO steps: rollout, then epochs x mini-batches of updates."""
    rollout_batch_size: int = Field(ge=1)
    """Prompts per step, over all ranks."""
    mini_batch_size: int = Field(ge=1)
    """Samples per optimizer step, over all ranks."""
    epochs: int = Field(1, ge=1)
    """Passes over each rollout."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    bootstrap_truncated: bool = False
    """Continue a truncated response with the critic's value instead of 0."""
    whiten_advantages: bool = True
    """Zero mean and unit variance over all response tokens of the step."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The probability ratio is clipped below 1 - clip_low ..."""
    clip_high: float = Field(0.2, gt=0)
    """... and above 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the loss for negative advantages; null for none."""
    aggregation: Aggregation = "token"
    """Mean over all response tokens of a mini-batch, or of sequence means."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""
    importance_cap: float | None = Field(None, gt=0)
    """Weight tokens by min(exp(logp_trainer - logp_engine), cap); null leaves engine mismatch uncorrected."""
    mismatch_limit: float | None = Field(0.5, gt=0)
    """A mean |logp_engine - logp_trainer| above this ends the run before the rollout is trained on; null for no limit.
    The same weights in bf16 differ by about 0.01 on the mean, other weights by more than 1."""
    energy: EnergyConfig = EnergyConfig()
    """EPPO: eta > 0 penalises the energy loss; eta = 0 only reports it."""

    @model_validator(mode="after")
    def _divisible(self) -> "PPOSettings":
        if self.rollout_batch_size % self.mini_batch_size:
            raise ValueError(
                f"rollout_batch_size = {self.rollout_batch_size} is not divisible by "
                f"mini_batch_size = {self.mini_batch_size}"
            )
        return self


class GenerationConfig(SamplingParams, EngineConfig):
    """How the rollouts are sampled, and by what."""


class PromptsConfig(Config):
    """The prompts."""

    train: Path
    """JSON lines with {"prompt": text}; .gz is read too."""
    validation: Path | None = None
    """Prompts for validation rollouts; null for none."""
    max_prompt_length: int = Field(ge=1)
    """Longest prompt in tokens."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a longer one."""


class ValidationConfig(Config):
    """Rollouts on fixed prompts, before the first and after the last step and in between."""

    interval: int = Field(0, ge=0)
    """Steps between validations; 0 for only the first and the last."""
    max_prompts: int = Field(64, ge=1)
    """The first so many prompts are used."""
    greedy: bool = False
    """Greedy responses instead of sampled ones."""


class RewardAddress(ClientConfig):
    """Where a reward model is found."""

    job: Literal["reward", "critic"] = "reward"
    """The kind of job that serves it: its own, or the critic's."""


class ServersConfig(Config):
    """The other jobs."""

    critic: ClientConfig = ClientConfig(url="http://127.0.0.1:5555")
    rewards: tuple[RewardAddress, ...] = Field((RewardAddress(url="http://127.0.0.1:5556"),), min_length=1)
    """One or more reward models."""
    reward_kind: Literal["any", "bradley_terry", "odin", "inform", "warm"] = "any"
    """What the reward models have to be; anything else is an error."""
    held_out: RewardAddress | None = None
    """A reward model that training never sees; reported as reward/held_out. Costs one scoring pass a step."""


class PPOConfig(Config):
    """The PPO actor job."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0)
    """Of everything random: sampling, order of prompts and mini-batches."""
    model: ModelSetup
    """The SFT model, which the policy starts from and is compared with."""
    data: PromptsConfig
    generation: GenerationConfig
    ppo: PPOSettings
    optimizer: OptimizerConfig = OptimizerConfig()
    servers: ServersConfig = ServersConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Of the actor; the critic is saved with it."""
    monitor: MonitorConfig = MonitorConfig()
    """Signs of reward hacking, and what is to happen when they show."""
    gold_reward: str | None = None
    """A programmatic reward that is only reported: "module:function" taking (prompt, response, finished)."""
    record_rollouts: int | None = Field(None, ge=0)
    """Rows of each step's rollout that are written to rollouts/; null for all."""

    def check_model(self, model: ModelConfig, ranks: int) -> None:
        """ConfigError if the model's window or layers, or this number of ranks, do not allow these settings."""
        window, new = model.max_sequence_length, self.generation.max_new_tokens
        if self.data.max_prompt_length + new > window:
            raise ConfigError(
                f"data.max_prompt_length {self.data.max_prompt_length} + generation.max_new_tokens {new} is more than "
                f"the model's window of {window} tokens"
            )
        self.model.parallel.check_update("ppo.mini_batch_size", self.ppo.mini_batch_size, ranks)
        self.ppo.energy.layer_indices(model.num_layers)

    @model_validator(mode="after")
    def _consistent(self) -> "PPOConfig":
        if self.generation.greedy:
            raise ValueError("generation.greedy = true: PPO has to sample its rollouts")
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> "PPOConfig":
        gold = ("validation/gold_reward",) if self.gold_reward else ()
        self.checkpoint.check_best(("validation/proxy_reward", *gold, "validation/energy_loss"))
        if self.checkpoint.best is not None and self.data.validation is None:
            raise ValueError(f"checkpoint.best = {self.checkpoint.best!r} needs data.validation")
        return self

    @model_validator(mode="after")
    def _monitor_can_work(self) -> "PPOConfig":
        monitor, beta = self.monitor, self.ppo.kl.coefficient
        if monitor.raises_kl and not 0 < beta < monitor.kl_max:
            raise ValueError(
                f"monitor.{monitor.raises_kl[0]}.action = 'raise_kl' needs 0 < ppo.kl.coefficient < monitor.kl_max, "
                f"got {beta} and {monitor.kl_max}"
            )
        against = monitor.disagreement.against
        given = self.gold_reward if against == "gold" else self.servers.held_out
        if monitor.disagreement.action != "none" and given is None:
            missing = "gold_reward" if against == "gold" else "servers.held_out"
            raise ValueError(f"monitor.disagreement.against = '{against}' needs {missing}")
        return self
