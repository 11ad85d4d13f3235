"""The actor job: what is checked before anything is built, and how a PPO is built from it."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from nemo_eppo.data.datasets import GlobalBatches, PromptDataset, PromptItem
from nemo_eppo.generation.build import check_engine
from nemo_eppo.generation.stops import Stops
from nemo_eppo.megatron import runtime
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
from nemo_eppo.training.energy_cache import energy_cache
from nemo_eppo.training.policy import build_policy
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
        self._critic = ColocatedCritic(colocated, self.plan, longest, config.ppo.updates) if colocated else None
        self._rewards = {f"rewards[{index}]": source for index, source in enumerate(config.rewards)}
        self._held_out = {"held_out_reward": config.held_out_reward} if config.held_out_reward else {}
        self._reward_models: dict[str, ColocatedReward] = {}
        for key, source in (self._rewards | self._held_out).items():
            kind = config.reward_kind if key in self._rewards else "any"
            if source.colocated is not None:
                self._reward_models[key] = ColocatedReward(key, source, source.colocated, self.plan, longest, kind)
        check_own_code(config)
        for asked in (config.critic, *config.rewards, config.held_out_reward):
            if run.rank == 0 and asked is not None and asked.server is not None and asked.server.certificates:
                Certificates.of(asked.server.certificates)
        self.pipeline = RewardPipeline(config.shaping)
        self.monitor = HackingMonitor(config.monitor)
        self.prompts = self._dataset(config.data.train)
        self.batches = GlobalBatches(
            len(self.prompts), config.ppo.rollout_batch_size, seed=config.seed, digest=self.prompts.digest
        )
        self.remotes: list[Remote] = []
        self.validation_prompts: list[PromptItem] = []
        if config.data.validation is not None:
            self.validation_prompts = self._dataset(config.data.validation).items[: config.validation.max_prompts]

    def _dataset(self, path: Path) -> PromptDataset:
        data = self.config.data
        return PromptDataset(
            path, self.plan.tokenizer, max_prompt_length=data.max_prompt_length, too_long=data.too_long
        )

    def build(self, stack: ExitStack) -> PPO:
        """Join the ranks, build policy and reference, and build or connect to critic and reward models. They are
        closed when `stack` closes."""
        config, tokenizer = self.config, self.plan.tokenizer
        runtime.initialize(config.model.parallel, config.seed)
        if self._critic is not None:  # built before the policy, which stays on the device
            self._critic.build(self.run_files.directory / "critic")
        for model in self._reward_models.values():
            model.build()
        runner = build(self.plan, "lm", optimizer=config.optimizer, total_steps=config.ppo.updates, probe=config.energy)
        sampling = config.generation
        ending = Stops(sampling.stop_strings, tokenizer.eos_id, tokenizer).ids
        set_distribution(runner.chunks, sampling.distribution(ending))
        reference = AdaptersOff(runner.chunks) if config.model.lora else FrozenWeights(runner.chunks)
        allocate_state(runner.optimizer)  # the engine's KV cache is a share of what is free when it starts
        cache = None
        if "ref_energies" in self.pipeline.needs and config.energy.reference == "own_response":
            cache = energy_cache(self.plan, config, self.run_files.directory)
            if self.run_files.rank == 0 and cache is not None and not cache.directory.exists():
                for directory, differences in cache.others().items():
                    self.run_files.logger.warning(
                        "the answers in %s are of other settings, and are not used: %s",
                        cache.directory.with_name(directory),
                        "; ".join(differences),
                    )
        policy = build_policy(self.plan, config, runner, reference, cache, self.run_files.directory)
        stack.callback(policy.engine.close)
        expect = {"tokenizer": tokenizer.digest, "max_sequence_length": config.longest}
        critic: Critic | None = self._critic
        if config.critic is not None and config.critic.server is not None:
            critic = remote = RemoteCritic(config.critic.server, expect, config.ppo.mini_batch_size)
            self.remotes.append(remote)
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

        rewards = sources(self._rewards, config.reward_kind)
        observed = {}
        if config.gold_reward is not None:
            observed["gold"] = sources({"gold_reward": RewardSourceConfig(function=config.gold_reward)})
        if self._held_out:
            observed["held_out"] = sources(self._held_out)
        self.pipeline.check_sources(rewards.columns, rewards.latent_size)
        self.monitor.check_latents(rewards.latent_size)
        return PPO(config.ppo, self.pipeline, policy, critic, rewards, observed, sampling, tokenizer, config.seed)


def check_own_code(config: PPOConfig) -> None:
    """Raise ConfigError if one of the user's functions or shaping terms cannot be loaded."""
    functions = {f"rewards[{index}].function": source.function for index, source in enumerate(config.rewards)}
    functions["gold_reward"] = config.gold_reward
    if config.held_out_reward is not None:
        functions["held_out_reward.function"] = config.held_out_reward.function
    for key, function in functions.items():
        if function is not None:
            check_function(key, function)
    build_terms(config.shaping)
