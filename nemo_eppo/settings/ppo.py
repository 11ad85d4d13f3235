"""Every setting of the PPO actor job (conf/gpt_ppo_actor.yaml)."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nemo_eppo.algorithms.choices import ESTIMATOR_NEEDS, ESTIMATOR_SETTINGS, Aggregation, EnergyWindow, EstimatorName
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.settings.critic import CriticSource
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import EngineConfig, SamplingParams
from nemo_eppo.settings.model import ModelConfig, ModelSetup
from nemo_eppo.settings.monitor import MonitorConfig
from nemo_eppo.settings.rewards import FunctionsConfig, RewardAddress, RewardKind, RewardSourceConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.servers import ServersConfig
from nemo_eppo.settings.shaping import ShapingConfig
from nemo_eppo.settings.training import CheckpointConfig, OptimizerConfig

HERE = RewardSourceConfig(server=RewardAddress(url="grpc://127.0.0.1:5556"))
"""The reward job on this machine, at the address that conf/serve_reward_model.yaml sets."""


class AdvantagesConfig(Config):
    """How advantages are computed from rewards. A setting that is null takes the estimator's own default; one that the
    estimator does not have must stay null."""

    estimator: EstimatorName = "gae"
    """`gae` needs a critic, the others have none: `grpo` and `rloo` compare the responses to one prompt with each
    other, `reinforce_plus_plus` all responses of a step, `remax` each response with the greedy one."""
    gamma: float | None = Field(None, ge=0, le=1)
    """Discount per token for gae and reinforce_plus_plus; null for 1."""
    lam: float | None = Field(None, ge=0, le=1)
    """Lambda of generalised advantage estimation for gae; null for 0.95."""
    whiten: bool | None = None
    """Give advantages zero mean and unit variance over all response tokens of a step, for gae; null for true."""
    bootstrap_truncated: bool | None = None
    """Use the critic's value instead of 0 after a truncated response, for gae; null for false."""
    normalize_std: bool | None = None
    """Divide by the standard deviation of a group's rewards, for grpo; null for true, false gives Dr. GRPO."""

    @model_validator(mode="after")
    def _settings_are_the_estimators(self) -> "AdvantagesConfig":
        known = set(ESTIMATOR_SETTINGS[self.estimator])
        if foreign := sorted(self.given.keys() - known):
            raise ValueError(f"estimator '{self.estimator}' has no {foreign[0]}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The estimator's settings that are not null."""
        return {name: value for name, value in self if name != "estimator" and value is not None}


class PPOSettings(Config):
    """Settings of the PPO loop and of the policy's loss."""

    max_steps: int = Field(ge=1)
    """Number of PPO steps; each is a rollout, then one update per mini-batch and epoch."""
    rollout_batch_size: int = Field(ge=1)
    """Prompts per step over all ranks."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt; at least 2 for an estimator that compares them with each other."""
    mini_batch_size: int = Field(ge=1)
    """Responses per update over all ranks."""
    epochs: int = Field(1, ge=1)
    """Passes of updates over each rollout."""
    critic_warmup_steps: int = Field(0, ge=0)
    """Number of first steps in which the critic learns and the policy does not: a critic that begins as a reward model
    knows the end of a response, not yet its beginning."""
    advantages: AdvantagesConfig = AdvantagesConfig()
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The loss clips probability ratios below 1 - clip_low ..."""
    clip_high: float = Field(0.2, gt=0)
    """... and above 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Probability ratio at which the loss of negative advantages is bounded; null for no bound."""
    aggregation: Aggregation = "token"
    """`token`: mean over all response tokens of a mini-batch; `sequence`: mean over responses of their mean over
    tokens; `fixed`: sum over tokens divided by responses x generation.max_new_tokens (Dr. GRPO)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of an entropy bonus in the loss; 0 for none."""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Source of the log-probs and energy losses before a step's updates: a forward pass of the trainer over each
    rollout, or (engine) what engine.name = megatron reads while it decodes, which saves that pass. In fp32 both are the
    same up to rounding. In bf16 their log-probs differ by about 0.01 per token. With engine, steps 1, 51, 101, ... and
    the first after a resume still compare both."""
    importance_cap: float | None = Field(None, gt=0)
    """Cap of the token weights min(exp(logp_trainer - logp_engine), cap); null leaves engine mismatch uncorrected."""
    mismatch_limit: float | None = Field(0.5, gt=0)
    """Mean |logp_engine - logp_trainer| in nats above which the run ends before it trains on the rollout; null for no
    limit. The same weights in bf16 differ by about 0.01 on average, other weights by more than 1."""

    @model_validator(mode="after")
    def _engine_differs(self) -> "PPOSettings":
        if self.old_logprobs == "engine" and self.importance_cap is not None:
            raise ValueError(
                f"importance_cap = {self.importance_cap:g} corrects for the difference between engine and trainer, but "
                "with old_logprobs = 'engine' there is none: expected null"
            )
        return self

    @model_validator(mode="after")
    def _the_critic_warms_up(self) -> "PPOSettings":
        if not self.critic_warmup_steps:
            return self
        if self.critic_warmup_steps >= self.max_steps:
            raise ValueError(
                f"critic_warmup_steps = {self.critic_warmup_steps}: the policy would never learn, expected less than "
                f"max_steps = {self.max_steps}"
            )
        if ESTIMATOR_NEEDS[self.advantages.estimator] != "critic":
            raise ValueError(
                f"critic_warmup_steps = {self.critic_warmup_steps}: advantages.estimator "
                f"'{self.advantages.estimator}' has no critic, expected 0"
            )
        return self

    @model_validator(mode="after")
    def _groups_and_batches(self) -> "PPOSettings":
        if self.responses % self.mini_batch_size:
            raise ValueError(
                f"rollout_batch_size = {self.rollout_batch_size} x samples_per_prompt = {self.samples_per_prompt} is "
                f"not divisible by mini_batch_size = {self.mini_batch_size}"
            )
        if ESTIMATOR_NEEDS[self.advantages.estimator] == "group" and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt = {self.samples_per_prompt}: advantages.estimator '{self.advantages.estimator}' "
                "compares the responses to one prompt, expected at least 2"
            )
        return self

    @property
    def responses(self) -> int:
        """Number of responses per step."""
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Number of updates in a step."""
        return self.epochs * self.responses // self.mini_batch_size

    @property
    def policy_updates(self) -> int:
        """Number of the policy's updates in the whole run."""
        return (self.max_steps - self.critic_warmup_steps) * self.updates_per_step

    @property
    def critic_updates(self) -> int:
        """Number of the critic's updates in the whole run."""
        return self.max_steps * self.updates_per_step


class EnergyConfig(EnergyProbeConfig):
    """How energy loss is read and what the policy's is compared with; shaping.energy_penalty weighs the difference."""

    reference: Literal["own_response", "same_response"] = "own_response"
    """Response on which the SFT model's energy loss is read: its own greedy answer to the prompt (paper; computed once
    per prompt), or the policy's response (no generation; uses the reference's log-prob pass)."""
    window: EnergyWindow = "response"
    """Which hidden states count: those at the response tokens, or (generating) those one position earlier."""
    cache: Path | None = None
    """Directory of the SFT model's answers and energies, which runs can share, and which read_reference_energies.py
    fills before or beside them; null for <run directory>/energy_cache. Entries of another model, tokenizer, generation
    or energy settings are never used."""
    max_tokens: int | None = Field(None, ge=1)
    """Number of response tokens that count, from the first (authors: 1024); null for all."""


class PromptsConfig(Config):
    """Files of prompts, and which prompts are too long."""

    train: Path
    """JSON lines {"prompt": text}; .gz is read too. Reward functions get the other fields of a row."""
    validation: Path | None = None
    """File of prompts for validation rollouts; null for no validation."""
    max_prompt_length: int = Field(ge=1)
    """Longest prompt in tokens."""
    too_long: Literal["error", "drop"] = "error"
    """Whether a longer prompt is an error or is dropped."""


class ValidationConfig(Config):
    """Rollouts on fixed prompts before the first step, after the last and in between."""

    interval: int = Field(0, ge=0)
    """Steps between validations; 0 for only the first and the last validation."""
    max_prompts: int = Field(64, ge=1)
    """Number of prompts that are used, from the beginning of the validation file."""
    greedy: bool = False
    """Whether validation responses are greedy instead of sampled."""


class AnsweringConfig(Config):
    """Settings of all jobs that answer prompts and read energies."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0, lt=2**31)
    """Seed of everything random: sampling, order of prompts and mini-batches."""
    model: ModelSetup
    """The SFT model, which the policy starts from and is compared with."""
    data: PromptsConfig
    generation: SamplingParams
    engine: EngineConfig = EngineConfig()
    energy: EnergyConfig = EnergyConfig()

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt and response together."""
        return self.data.max_prompt_length + self.generation.max_new_tokens

    @property
    def answer_settings(self) -> dict[str, Any]:
        """The settings that the reference's own answers and their energies depend on, as plain containers."""
        read = {"preset", "layers", "norm", "window", "max_tokens"}
        return {
            "precision": self.model.precision,
            "generation": self.generation.as_greedy.model_dump(mode="json"),
            "energy": self.energy.model_dump(mode="json", include=read),
        }

    def check_model(self, model: ModelConfig, ranks: int) -> None:
        """Raise ConfigError if the model's window or layers or the number of ranks do not allow these settings."""
        window, new = model.max_sequence_length, self.generation.max_new_tokens
        if self.longest > window:
            raise ConfigError(
                f"data.max_prompt_length {self.data.max_prompt_length} + generation.max_new_tokens {new} is more than "
                f"the model's window of {window} tokens"
            )
        self.energy.layer_indices(model.num_layers)


class PPOConfig(AnsweringConfig):
    """The PPO actor job."""

    ppo: PPOSettings
    rewards: tuple[RewardSourceConfig, ...] = Field((HERE,), min_length=1)
    """Reward models and functions that the reward is made of."""
    shaping: ShapingConfig = ShapingConfig()
    reward_kind: RewardKind = "any"
    """Kind that all reward models of `rewards` must have; another kind is an error."""
    reward_functions: FunctionsConfig = FunctionsConfig()
    critic: CriticSource | None = CriticSource()
    """Where the critic runs; null for an estimator of advantages that needs no critic."""
    servers: ServersConfig = ServersConfig()
    optimizer: OptimizerConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(interval=10)
    """When the actor is saved and what is kept; the critic is saved with it."""
    monitor: MonitorConfig = MonitorConfig()
    """Signs of reward hacking, and what happens when they appear."""
    gold_reward: str | None = None
    """Reward function "module:name" that is only reported, as reward/gold; null for none."""
    held_out_reward: RewardSourceConfig | None = None
    """Source of reward that is not trained on, reported standardised as reward/held_out; null for none."""
    record_rollouts: int | None = Field(None, ge=0)
    """Number of rows of each step's rollout that are written to rollouts/; null for all."""

    def check_model(self, model: ModelConfig, ranks: int) -> None:
        super().check_model(model, ranks)
        self.model.parallel.check_update("ppo.mini_batch_size", self.ppo.mini_batch_size, ranks)

    @property
    def reward_sources(self) -> dict[str, RewardSourceConfig]:
        """The sources of reward by their keys, the held-out one included; without the gold reward."""
        sources = {f"rewards[{index}]": source for index, source in enumerate(self.rewards)}
        return sources | ({"held_out_reward": self.held_out_reward} if self.held_out_reward is not None else {})

    @model_validator(mode="after")
    def _rollouts_are_sampled(self) -> "PPOConfig":
        if self.generation.greedy:
            raise ValueError("generation.greedy = true: PPO has to sample its rollouts")
        return self

    @model_validator(mode="after")
    def _engine_reads(self) -> "PPOConfig":
        if self.ppo.old_logprobs == "engine" and self.engine.name != "megatron":
            raise ValueError(
                f"ppo.old_logprobs = 'engine' needs engine.name = 'megatron', not {self.engine.name!r}, which reads no "
                "energies: expected 'recompute'"
            )
        return self

    @model_validator(mode="after")
    def _weights_correct_what_differs(self) -> "PPOConfig":
        filtered = self.generation.top_k or self.generation.top_p < 1
        if self.engine.name == "tensorrt_llm" and self.ppo.importance_cap is not None and filtered:
            raise ValueError(
                f"ppo.importance_cap = {self.ppo.importance_cap:g}: TensorRT-LLM's log-probs are those before "
                f"generation.top_k = {self.generation.top_k} and top_p = {self.generation.top_p:g}, so all weights "
                "would be too large; expected null, or top_k 0 and top_p 1"
            )
        return self

    @model_validator(mode="after")
    def _learning_rates_decay(self) -> "PPOConfig":
        self.optimizer.check_decay(self.ppo.policy_updates)
        if self.critic is not None and self.critic.colocated is not None:
            self.critic.colocated.optimizer.check_decay(self.ppo.critic_updates)
        return self

    @model_validator(mode="after")
    def _critic_is_needed(self) -> "PPOConfig":
        estimator = self.ppo.advantages.estimator
        needs_critic = ESTIMATOR_NEEDS[estimator] == "critic"
        if needs_critic and self.critic is None:
            raise ValueError(f"critic = null: ppo.advantages.estimator '{estimator}' needs a critic")
        if not needs_critic and self.critic is not None:
            raise ValueError(f"critic is set, but ppo.advantages.estimator '{estimator}' needs none: expected null")
        return self

    @model_validator(mode="after")
    def _models_are_combined(self) -> "PPOConfig":
        models = sum(source.function is None for source in self.rewards)  # at least: a server may have several
        if self.shaping.combine == "single" and models > 1:
            raise ValueError(
                f"shaping.combine = 'single', but rewards are of {models} reward models: expected sum, mean, wco or uwo"
            )
        for index, source in enumerate(self.rewards):
            if self.shaping.combine in ("wco", "uwo") and source.function is None and source.weight != 1:
                raise ValueError(
                    f"rewards[{index}].weight = {source.weight:g} with shaping.combine = '{self.shaping.combine}': a "
                    "model of weight 0 would still be the minimum, or add to the variance; expected 1"
                )
        return self

    @model_validator(mode="after")
    def _held_out_has_no_weight(self) -> "PPOConfig":
        if self.held_out_reward is not None and "weight" in self.held_out_reward.model_fields_set:
            raise ValueError(
                f"held_out_reward.weight = {self.held_out_reward.weight:g}: it is part of no sum, expected no weight"
            )
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
