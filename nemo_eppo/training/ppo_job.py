"""The actor job: checks files and settings, then builds or connects to the models of a PPO run."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_eppo.data.datasets import GlobalBatches, PromptDataset, PromptItem
from nemo_eppo.generation.build import check_engine
from nemo_eppo.generation.stops import Stops
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.collectives import require_same
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.model import set_distribution
from nemo_eppo.megatron.optimizer import allocate_state
from nemo_eppo.monitor.monitor import HackingMonitor
from nemo_eppo.observability.run import Run
from nemo_eppo.rewards.functions import FunctionPool, check_function
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.shaping import build_terms
from nemo_eppo.servers.certificates import Certificates
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.rewards import RewardKind, RewardSourceConfig
from nemo_eppo.training.colocated import ColocatedCritic, ColocatedReward
from nemo_eppo.training.critics import Critic, RemoteCritic
from nemo_eppo.training.energy_cache import EnergyCache, energy_cache
from nemo_eppo.training.policy import Policy, build_policy
from nemo_eppo.training.ppo import PPO
from nemo_eppo.training.recovery import Remote
from nemo_eppo.training.reward_sources import RewardSources, build_source
from nemo_eppo.training.setup import Plan, build, plan


class PPOJob:
    """The actor job on all of its ranks. The constructor checks files and settings; `build` builds the models.

    Raises:
        ConfigError: a file or a setting does not fit.
    """

    def __init__(self, config: PPOConfig, run: Run) -> None:
        self.config, self.run_files = config, run
        self.plan: Plan = plan(config.model, head="lm")
        config.check_model(self.plan.model, runtime.world_size())
        check_engine(config.engine, self.plan.model, config.model.parallel, config.generation)
        longest, colocated = config.longest, config.critic.colocated if config.critic else None
        self._critic = ColocatedCritic(colocated, self.plan, longest, config.ppo.critic_updates) if colocated else None
        self._reward_models: dict[str, ColocatedReward] = {}
        for key, source in config.reward_sources.items():
            if source.colocated is not None:
                kind = "any" if key == "held_out_reward" else config.reward_kind
                self._reward_models[key] = ColocatedReward(key, source, source.colocated, self.plan, longest, kind)
        check_own_code(config)
        for part in (config.critic, *config.reward_sources.values()):
            if run.rank == 0 and part is not None and part.server is not None and part.server.certificates:
                Certificates.of(part.server.certificates)
        self.pipeline = RewardPipeline(config.shaping)
        self.monitor = HackingMonitor(config.monitor)
        self.prompts = self._dataset(config.data.train)
        self.batches = GlobalBatches(
            len(self.prompts), config.ppo.rollout_batch_size, seed=config.seed, digest=self.prompts.digest
        )
        self.remotes: list[Remote] = []
        self.validation_prompts: list[PromptItem] = []
        self._validation_digest = ""
        if config.data.validation is not None:
            validation = self._dataset(config.data.validation)
            self.validation_prompts = validation.items[: config.validation.max_prompts]
            self._validation_digest = validation.digest

    def _dataset(self, path: Path) -> PromptDataset:
        data = self.config.data
        return PromptDataset(
            path, self.plan.tokenizer, max_prompt_length=data.max_prompt_length, too_long=data.too_long
        )

    def build(self, stack: ExitStack) -> PPO:
        """Join the ranks, build policy and reference, and build or connect to critic and reward models. They are
        closed when `stack` closes."""
        config = self.config
        runtime.initialize(config.model.parallel, config.seed)
        require_same("data.train and data.validation: rows", (self.prompts.digest, self._validation_digest))
        if self._critic is not None:  # built before the policy, which stays on the device
            self._critic.build(self.run_files.directory / "critic")
        for model in self._reward_models.values():
            model.build()
        policy = self._build_policy()
        stack.callback(policy.engine.close)
        expect = {"tokenizer": self.plan.tokenizer.digest, "max_sequence_length": config.longest}
        critic = self._connect_critic(expect)
        if critic is not None:
            stack.callback(critic.close)
        pool = FunctionPool(config.reward_functions)
        stack.callback(pool.close)

        def sources(configs: Mapping[str, RewardSourceConfig], kind: RewardKind = "any") -> RewardSources:
            made = RewardSources(
                [
                    self._reward_models.get(key) or build_source(source, expect, kind, pool)
                    for key, source in configs.items()
                ]
            )
            stack.callback(made.close)
            self.remotes += made.remotes
            return made

        training_sources = config.reward_sources
        held_out = training_sources.pop("held_out_reward", None)
        rewards, observed = sources(training_sources, config.reward_kind), {}
        if config.gold_reward is not None:
            observed["gold"] = sources({"gold_reward": RewardSourceConfig(function=config.gold_reward)})
        if held_out is not None:
            observed["held_out"] = sources({"held_out_reward": held_out})
        self.pipeline.check_sources(rewards.columns, rewards.latent_size)
        self.monitor.check_latents(rewards.latent_size)
        return PPO(
            config.ppo,
            self.pipeline,
            policy,
            critic,
            rewards,
            observed,
            config.generation,
            self.plan.tokenizer,
            config.seed,
        )

    def _build_policy(self) -> Policy:
        config, updates = self.config, self.config.ppo.policy_updates
        runner = build(self.plan, "lm", optimizer=config.optimizer, total_steps=updates, probe=config.energy)
        ending = Stops(config.generation.stop_strings, self.plan.tokenizer.eos_id, self.plan.tokenizer).ids
        set_distribution(runner.chunks, config.generation.distribution(ending))
        reference = AdaptersOff(runner.chunks) if config.model.lora else FrozenWeights(runner.chunks)
        allocate_state(runner.optimizer)  # the engine's KV cache is a share of what is free when it starts
        return build_policy(self.plan, config, runner, reference, self._energy_cache(), self.run_files.directory)

    def _energy_cache(self) -> EnergyCache | None:
        """Return the cache of the reference's own answers, if the run needs them and something identifies the model."""
        config = self.config
        if "ref_energies" not in self.pipeline.needs or config.energy.reference != "own_response":
            return None
        cache = energy_cache(self.plan, config, self.run_files.directory)
        if self.run_files.rank == 0 and cache is not None and not cache.directory.exists():
            for directory, differences in cache.others().items():
                self.run_files.logger.warning(
                    "the answers in %s are of other settings, and are not used: %s",
                    cache.directory.with_name(directory),
                    "; ".join(differences),
                )
        return cache

    def _connect_critic(self, expect: Mapping[str, Any]) -> Critic | None:
        """Connect to the critic's server if it has one; return the critic, None if there is none."""
        config = self.config
        if config.critic is None or config.critic.server is None:
            return self._critic
        # one token more than the rollout's: a critic is asked for the value after the last one, too
        expect = {**expect, "max_sequence_length": config.longest + 1}
        remote = RemoteCritic(config.critic.server, expect, config.ppo.mini_batch_size)
        self.remotes.append(remote)
        return remote


def check_own_code(config: PPOConfig) -> None:
    """Raise ConfigError if one of the user's functions or shaping terms cannot be loaded."""
    functions = {f"{key}.function": source.function for key, source in config.reward_sources.items()}
    functions["gold_reward"] = config.gold_reward
    for key, function in functions.items():
        if function is not None:
            check_function(key, function)
    build_terms(config.shaping)
