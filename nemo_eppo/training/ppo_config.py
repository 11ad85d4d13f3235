"""Every setting of the PPO actor job (conf/gpt_ppo_actor.yaml)."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nemo_eppo.algorithms.advantages import ESTIMATORS, AdvantageEstimator, EstimatorName
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
from nemo_eppo.rewards.functions import FunctionsConfig, check_function
from nemo_eppo.rewards.shaping import ShapingConfig
from nemo_eppo.rollout.sampling import SamplingParams
from nemo_eppo.training.critics import CriticSource
from nemo_eppo.training.reward_sources import RewardAddress, RewardKind, RewardSourceConfig
from nemo_eppo.training.setup import ModelSetup

HERE = RewardSourceConfig(server=RewardAddress(url="http://127.0.0.1:5556"))
"""The reward job on this machine, where conf/serve_reward_model.yaml has it listen."""


class AdvantagesConfig(Config):
    """How advantages come from rewards. Settings that are null are the estimator's own defaults; those that it does not
    have must stay null."""

    estimator: EstimatorName = "gae"
    """`gae` needs a critic; the others have none: `grpo` and `rloo` compare the responses to one prompt with each
    other, `reinforce_plus_plus` all of the step, `remax` each with the greedy one."""
    gamma: float | None = Field(None, ge=0, le=1)
    """Discount per token, by default 1; gae and reinforce_plus_plus."""
    lam: float | None = Field(None, ge=0, le=1)
    """Lambda of generalised advantage estimation, by default 0.95; gae."""
    whiten: bool | None = None
    """Zero mean and unit variance over all response tokens of the step, by default true; gae."""
    bootstrap_truncated: bool | None = None
    """Continue a truncated response with the critic's value instead of 0, by default false; gae."""
    normalize_std: bool | None = None
    """Divide by the standard deviation of the group's rewards, by default true; grpo, which without it is Dr. GRPO."""

    @model_validator(mode="after")
    def _settings_are_the_estimators(self) -> "AdvantagesConfig":
        known = {field.name for field in dataclasses.fields(ESTIMATORS[self.estimator])}  # type: ignore[arg-type]
        if foreign := sorted(self._given.keys() - known):
            raise ValueError(f"estimator '{self.estimator}' has no {foreign[0]}")
        return self

    @property
    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self if name != "estimator" and value is not None}

    def build(self) -> AdvantageEstimator:
        """The estimator with its settings."""
        return ESTIMATORS[self.estimator](**self._given)


class PPOSettings(Config):
    """The loop and the policy's loss."""

    max_steps: int = Field(ge=1)
    """PPO steps: rollout, then epochs x mini-batches of updates."""
    rollout_batch_size: int = Field(ge=1)
    """Prompts per step, over all ranks."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt; an estimator that compares them with each other needs at least 2."""
    mini_batch_size: int = Field(ge=1)
    """Responses per optimizer step, over all ranks."""
    epochs: int = Field(1, ge=1)
    """Passes over each rollout."""
    advantages: AdvantagesConfig = AdvantagesConfig()
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The probability ratio is clipped below 1 - clip_low ..."""
    clip_high: float = Field(0.2, gt=0)
    """... and above 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the loss for negative advantages; null for none."""
    aggregation: Aggregation = "token"
    """`token`: mean over all response tokens of a mini-batch; `sequence`: mean of the means of responses; `fixed`: sum
    over tokens over what all responses could have been long (Dr. GRPO)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""
    importance_cap: float | None = Field(None, gt=0)
    """Weight tokens by min(exp(logp_trainer - logp_engine), cap); null leaves engine mismatch uncorrected."""
    mismatch_limit: float | None = Field(0.5, gt=0)
    """A mean |logp_engine - logp_trainer| above this ends the run before the rollout is trained on; null for no limit.
    The same weights in bf16 differ by about 0.01 on the mean, other weights by more than 1."""

    @model_validator(mode="after")
    def _groups_and_batches(self) -> "PPOSettings":
        if self.responses % self.mini_batch_size:
            raise ValueError(
                f"rollout_batch_size = {self.rollout_batch_size} x samples_per_prompt = {self.samples_per_prompt} is "
                f"not divisible by mini_batch_size = {self.mini_batch_size}"
            )
        if ESTIMATORS[self.advantages.estimator].needs == "group" and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt = {self.samples_per_prompt}: advantages.estimator '{self.advantages.estimator}' "
                "compares the responses to one prompt, expected at least 2"
            )
        return self

    @property
    def responses(self) -> int:
        """Responses per step."""
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps * self.epochs * self.responses // self.mini_batch_size


class EnergyConfig(EnergyProbeConfig):
    """How energy loss is read, and what the policy's is compared with; shaping.energy_penalty weighs the difference."""

    reference: Literal["own_response", "same_response"] = "own_response"
    """What the SFT model's energy loss is read on: its own greedy answer to the prompt (paper; computed once per
    prompt), or the policy's answer (no generation; rides on the reference's log-prob pass)."""
    window: EnergyWindow = "response"
    """Which hidden states count: at the response tokens, or (generating) one position earlier."""
    cache: Path | None = None
    """Directory of the SFT model's answers and energies, which runs can share; null for <run directory>/energy_cache.
    A change of model, tokenizer, generation or energy settings never finds old entries."""
    max_tokens: int | None = Field(None, ge=1)
    """Only the first response tokens count, up to this number (authors: 1024); null for all."""


class PromptsConfig(Config):
    """The prompts."""

    train: Path
    """JSON lines with {"prompt": text}; .gz is read too. Other fields of a row are given to reward functions."""
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
    """How many prompts of the validation file are used, from its beginning."""
    greedy: bool = False
    """Greedy responses instead of sampled ones."""


class PPOConfig(Config):
    """The PPO actor job."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0)
    """Seed of everything random: sampling, order of prompts and mini-batches."""
    model: ModelSetup
    """The SFT model, which the policy starts from and is compared with."""
    data: PromptsConfig
    generation: SamplingParams
    engine: EngineConfig = EngineConfig()
    ppo: PPOSettings
    energy: EnergyConfig = EnergyConfig()
    rewards: tuple[RewardSourceConfig, ...] = Field((HERE,), min_length=1)
    """Where the reward comes from: reward models and functions."""
    shaping: ShapingConfig = ShapingConfig()
    reward_kind: RewardKind = "any"
    """What all reward models of `rewards` have to be; anything else is an error."""
    reward_functions: FunctionsConfig = FunctionsConfig()
    critic: CriticSource | None = CriticSource()
    """Where the critic runs; null for an estimator of advantages that needs none."""
    optimizer: OptimizerConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints of the actor; the critic is saved with it."""
    monitor: MonitorConfig = MonitorConfig()
    """Signs of reward hacking, and what is to happen when they show."""
    gold_reward: str | None = None
    """Function that is only reported, as reward/gold: "module:function", like those of `rewards`."""
    held_out_reward: RewardSourceConfig | None = None
    """A reward model that training never sees; reported, standardised, as reward/held_out."""
    record_rollouts: int | None = Field(None, ge=0)
    """Rows of each step's rollout that are written to rollouts/; null for all."""

    def check_model(self, model: ModelConfig, ranks: int) -> None:
        """ConfigError if the model's window or layers, or this number of ranks, do not allow these settings."""
        window, new = model.max_sequence_length, self.generation.max_new_tokens
        if self.longest > window:
            raise ConfigError(
                f"data.max_prompt_length {self.data.max_prompt_length} + generation.max_new_tokens {new} is more than "
                f"the model's window of {window} tokens"
            )
        self.model.parallel.check_update("ppo.mini_batch_size", self.ppo.mini_batch_size, ranks)
        self.energy.layer_indices(model.num_layers)

    def check_own_code(self) -> None:
        """ConfigError if a function or term of the user's cannot be loaded."""
        functions = {f"rewards[{index}].function": source.function for index, source in enumerate(self.rewards)}
        functions["gold_reward"] = self.gold_reward
        if self.held_out_reward is not None:
            functions["held_out_reward.function"] = self.held_out_reward.function
        for key, function in functions.items():
            if function is not None:
                check_function(key, function)
        self.shaping.build_terms()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.data.max_prompt_length + self.generation.max_new_tokens

    @model_validator(mode="after")
    def _rollouts_are_sampled(self) -> "PPOConfig":
        if self.generation.greedy:
            raise ValueError("generation.greedy = true: PPO has to sample its rollouts")
        return self

    @model_validator(mode="after")
    def _critic_is_needed(self) -> "PPOConfig":
        estimator = self.ppo.advantages.estimator
        needs_critic = ESTIMATORS[estimator].needs == "critic"
        if needs_critic and self.critic is None:
            raise ValueError(f"critic = null: ppo.advantages.estimator '{estimator}' needs a critic")
        if not needs_critic and self.critic is not None:
            raise ValueError(f"critic is set, but ppo.advantages.estimator '{estimator}' needs none: expected null")
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
        monitor, beta = self.monitor, self.shaping.kl.coefficient
        if monitor.raises_kl and not 0 < beta < monitor.kl_max:
            raise ValueError(
                f"monitor.{monitor.raises_kl[0]}.action = 'raise_kl' needs 0 < shaping.kl.coefficient < "
                f"monitor.kl_max, got {beta} and {monitor.kl_max}"
            )
        against = monitor.disagreement.against
        given = self.gold_reward if against == "gold" else self.held_out_reward
        if monitor.disagreement.action != "none" and given is None:
            missing = "gold_reward" if against == "gold" else "held_out_reward"
            raise ValueError(f"monitor.disagreement.against = '{against}' needs {missing}")
        return self
