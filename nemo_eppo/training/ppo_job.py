"""The actor job: everything around the PPO steps. Prompts, validation, metrics, rollout files, checkpoints, resume."""

import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import GlobalBatches, PromptDataset
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.files import write_atomically
from nemo_eppo.generation.build import build_engine, check_engine
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.megatron.logprobs import ScoringConfig
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.model import set_scoring
from nemo_eppo.megatron.saving import CHECKPOINTS, CheckpointSaver, due, tidy
from nemo_eppo.models import checkpoint_files
from nemo_eppo.monitor.monitor import HackingMonitor
from nemo_eppo.observability.metrics import MetricsLogger
from nemo_eppo.observability.progress import PPO_COLUMNS, Progress
from nemo_eppo.observability.recorder import RolloutRecorder
from nemo_eppo.observability.run import Run
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.user_terms import load_named
from nemo_eppo.rollout.batch import Completion, FinishReason, RolloutBatch, seeds_for, step_seed
from nemo_eppo.rollout.sampling import SamplingParams
from nemo_eppo.training.energy_cache import EnergyCache
from nemo_eppo.training.held_out import HeldOutReward
from nemo_eppo.training.policy import Policy
from nemo_eppo.training.ppo import PPO, GoldReward, StepResult
from nemo_eppo.training.ppo_config import PPOConfig
from nemo_eppo.training.remote import RemoteModels
from nemo_eppo.training.setup import Plan, build, plan
from nemo_eppo.training.stopping import StopWatch


class PPOJob:
    """The actor job on all of its ranks. Files are checked when it is made, models are built in `run`."""

    def __init__(self, config: PPOConfig, run: Run) -> None:
        self.config, self.run_files, self.directory = config, run, run.directory
        self.checkpoints = run.directory / CHECKPOINTS
        self.plan: Plan = plan(config.model, head="lm")
        self.tokenizer: Tokenizer = self.plan.tokenizer
        self.sampling = SamplingParams(**config.generation.model_dump(include=set(SamplingParams.model_fields)))
        self.longest = config.data.max_prompt_length + self.sampling.max_new_tokens
        config.check_model(self.plan.model, runtime.world_size())
        check_engine(config.generation, self.plan.model, config.model.parallel)
        self.pipeline = RewardPipeline(config.ppo)
        self.monitor = HackingMonitor(config.monitor)
        self.gold = load_gold_reward(config.gold_reward) if config.gold_reward else None
        data = config.data
        self.prompts = PromptDataset(
            data.train, self.tokenizer, max_prompt_length=data.max_prompt_length, too_long=data.too_long
        )
        self.batches = GlobalBatches(
            len(self.prompts), config.ppo.rollout_batch_size, seed=config.seed, digest=self.prompts.digest
        )
        self.validation_prompts = []
        if data.validation is not None:
            validation = PromptDataset(
                data.validation, self.tokenizer, max_prompt_length=data.max_prompt_length, too_long=data.too_long
            )
            self.validation_prompts = validation.items[: config.validation.max_prompts]

    def start(self) -> PPO:
        """Join the ranks, build policy and reference, connect to the servers, resume if there is something to."""
        config = self.config
        runtime.initialize(config.model.parallel, config.seed)
        runner = build(
            self.plan,
            "lm",
            optimizer=config.optimizer,
            total_steps=config.ppo.max_steps
            * config.ppo.epochs
            * config.ppo.rollout_batch_size
            // config.ppo.mini_batch_size,
            probe=config.ppo.energy,
        )
        set_scoring(runner.chunks, ScoringConfig(**self.sampling.model_dump(include=set(ScoringConfig.model_fields))))
        reference = AdaptersOff(runner.chunks) if config.model.lora else FrozenWeights(runner.chunks)
        engine = build_engine(
            config.generation,
            runner.chunks,
            self.plan.model,
            self.tokenizer,
            self.plan.tokenizer_path,
            self.longest,
            self.directory,
        )
        own_answers = SamplingParams(max_new_tokens=self.sampling.max_new_tokens, greedy=True)
        cache = self._energy_cache(own_answers)
        policy = Policy(runner, self.plan.model, reference, engine, config.ppo.energy, own_answers, cache)
        expect = {"tokenizer": self.tokenizer.digest(), "max_sequence_length": self.longest}
        remote = RemoteModels(config.servers, expect, config.ppo.mini_batch_size)
        self.pipeline.check_models(len(remote.statistics.mean), remote.statistics.latent_size)
        self.monitor.check_latents(remote.statistics.latent_size)
        held_out = config.servers.held_out
        self.held_out = HeldOutReward(held_out, expect) if held_out else None
        ppo = PPO(config.ppo, self.pipeline, policy, remote, self.sampling, self.tokenizer.pad_id, config.seed)
        self.saver = CheckpointSaver(self.checkpoints, self.plan.tokenizer_path, config.checkpoint.asynchronous)
        self.done = self._resume(ppo)
        policy.refit()
        return ppo

    def _energy_cache(self, own_answers: SamplingParams) -> EnergyCache | None:
        """The cache on disk; a model with fresh weights has none, for nothing identifies it."""
        energy, source = self.config.ppo.energy, self.plan.source
        if source is None or energy.eta == 0 or energy.reference == "same_response":
            return None
        key = {
            "model": checkpoint_files.model_identity(source if isinstance(source, Path) else source.path),
            "precision": self.config.model.precision,
            "tokenizer": self.tokenizer.digest(),
            "generation": own_answers.model_dump(mode="json"),
            "energy": energy.model_dump(mode="json", include={"preset", "layers", "norm", "window", "max_tokens"}),
        }
        return EnergyCache(energy.cache or self.directory / "energy_cache", key)

    def run(self) -> None:
        """Train to the last step."""
        ppo = self.start()
        config, last = self.config, self.config.ppo.max_steps
        if self.done >= last:
            self.run_files.logger.info(
                "%d steps are done of ppo.max_steps = %d: nothing is left to do", self.done, last
            )
        with ExitStack() as stack:
            stack.callback(ppo.remote.close)
            stack.callback(ppo.policy.engine.close)
            if self.held_out is not None:
                stack.callback(self.held_out.close)
            watch = stack.enter_context(StopWatch(self.run_files))
            metrics, recorder = self._open_files(stack)
            progress = stack.enter_context(
                Progress("PPO", last, PPO_COLUMNS, done=self.done, disable=dist.get_rank() != 0)
            )
            if self.done == 0:
                before = self._validate(ppo, 0, metrics)
                if before and not config.validation.greedy:  # the energies of greedy responses are others
                    self.monitor.observe_sft(before["validation/energy_loss"])
            for step in range(self.done + 1, last + 1):
                items = [self.prompts[index] for index in next(self.batches)]
                result = ppo.step(step, [item.token_ids.tolist() for item in items])
                started = time.perf_counter()
                gold = self._gold([item.text for item in items], result.completions)
                row = result.metrics | ({"reward/gold": sum(gold) / len(gold)} if gold else {})
                if self.held_out is not None:
                    row["reward/held_out"] = self.held_out.mean(result.batch)
                is_last = self._watch(ppo, step, row, result.latents) or step == last
                stop = watch.due()
                save = stop or is_last or due(step, config.checkpoint.interval)
                if recorder is not None:
                    recorder.record(step, self._rollout_rows([item.text for item in items], result, gold))
                validation = {}
                if is_last or due(step, config.validation.interval) or (save and config.checkpoint.best):
                    validation = self._validate(ppo, step, None)
                if save:
                    self._save(ppo, step, validation)
                self.saver.poll()
                row |= validation
                row["seconds/after_step"] = time.perf_counter() - started
                if metrics is not None:
                    metrics.log(step, row)
                progress.update(step, row)
                if is_last or stop:
                    break
            self.saver.finish()
            ppo.timers.close()

    def _open_files(self, stack: ExitStack) -> tuple[MetricsLogger | None, RolloutRecorder | None]:
        if dist.get_rank():
            return None, None
        recorder = RolloutRecorder(self.directory / "rollouts", self.config.record_rollouts)
        return stack.enter_context(self.run_files.open_metrics(self.done or None)), recorder

    def _validate(self, ppo: PPO, step: int, metrics: MetricsLogger | None) -> dict[str, float]:
        """Rollouts on the validation prompts; rows to validation/, means as metrics."""
        if not self.validation_prompts:
            return {}
        prompts = [item.token_ids.tolist() for item in self.validation_prompts]
        texts = [item.text for item in self.validation_prompts]
        sampling = self.sampling
        if self.config.validation.greedy:
            sampling = SamplingParams(max_new_tokens=sampling.max_new_tokens, greedy=True)
        seeds = seeds_for(step_seed(self.config.seed, 0), torch.arange(len(prompts)))
        completions = ppo.policy.generate(prompts, sampling, seeds)
        batch = RolloutBatch.from_completions(prompts, completions, self.tokenizer.pad_id)
        scores = ppo.remote.collect(ppo.remote.ask(batch, values=False)).scores
        energies = ppo.policy.score(batch).energies
        assert energies is not None
        proxy = ppo.pipeline.combine(scores, ppo.remote.statistics.mean, ppo.remote.statistics.std)
        gold = self._gold(texts, completions)
        columns: dict[str, list[float]] = {
            "proxy_reward": proxy.tolist(),
            "energy_loss": energies.mean(1).tolist(),
            "response_length": [float(len(completion.token_ids)) for completion in completions],
        }
        if gold:
            columns["gold_reward"] = gold
        if dist.get_rank() == 0:
            rows = [
                {
                    "prompt": text,
                    "response": self.tokenizer.decode(completion.token_ids),
                    "finish_reason": str(completion.finish_reason),
                    **{name: column[index] for name, column in columns.items()},
                }
                for index, (text, completion) in enumerate(zip(texts, completions, strict=True))
            ]
            RolloutRecorder(self.directory / "validation").record(step, rows)
        means = {f"validation/{name}": sum(column) / len(column) for name, column in columns.items()}
        if metrics is not None:
            metrics.log(step, means)
        return means

    def _watch(self, ppo: PPO, step: int, row: dict[str, float], latents: torch.Tensor | None) -> bool:
        """Show a step's metrics to the hacking monitor and add its own to them; whether it wants the run to stop."""
        watched = on_rank0(lambda: self.monitor.observe(step, row, latents))  # one verdict for all ranks
        row |= watched.metrics
        actions = [alarm.action for alarm in watched.alarms]
        if "raise_kl" in actions:
            controller = ppo.pipeline.kl_controller
            controller.value = self.monitor.raise_kl(controller.value)
        if dist.get_rank() == 0:
            for alarm in watched.alarms:
                self.run_files.logger.warning("%s", alarm)
        return "stop" in actions

    def _gold(self, prompts: list[str], completions: list[Completion]) -> list[float]:
        gold = self.gold
        if gold is None:
            return []
        return on_rank0(
            lambda: [
                gold(prompt, self.tokenizer.decode(c.token_ids), c.finish_reason is FinishReason.STOP)
                for prompt, c in zip(prompts, completions, strict=True)
            ]
        )

    def _rollout_rows(self, prompts: list[str], result: StepResult, gold: list[float]) -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "response": self.tokenizer.decode(completion.token_ids),
                "finish_reason": str(completion.finish_reason),
                "response_length": len(completion.token_ids),
                **ledger,
                **({"reward/gold": gold[index]} if gold else {}),
            }
            for index, (prompt, completion, ledger) in enumerate(
                zip(prompts, result.completions, result.ledger.rows(), strict=True)
            )
        ]

    def _save(self, ppo: PPO, step: int, validation: dict[str, float]) -> None:
        """Save actor and critic. The actor's checkpoint comes into being after the critic's, so that every actor that
        can be resumed finds its critic; each drops a checkpoint only when the other no longer needs it."""
        self.saver.finish()
        critic = ppo.remote.save(on_rank0(self._critics_needed))
        updates = ppo.remote.updates
        state = {
            "batches": self.batches.state_dict(),
            "pipeline": ppo.pipeline.state_dict(),
            "monitor": self.monitor.state_dict(),
            "kl_coefficient": ppo.pipeline.kl_controller.value,
            "critic_updates": updates,
            "critic_checkpoint": critic,
        }
        manifest = checkpoint_files.Manifest(
            head="lm", step=step, model=self.plan.model, metrics=validation, optimizer=True, state=state
        )
        self.saver.save(
            ppo.policy.runner,
            manifest,
            before=lambda: ppo.remote.critic.saved(updates).result(),
            after=lambda: tidy(self.checkpoints, self.config.checkpoint),
        )

    def _critics_needed(self) -> list[int]:
        """The critic's updates that this run's checkpoints go with."""
        saved = checkpoint_files.complete_in(self.checkpoints)
        return [checkpoint_files.read_manifest(path).state["critic_updates"] for path in saved]

    def _resume(self, ppo: PPO) -> int:
        """Load the newest checkpoint of this run, if there is one, and have the critic go back to the same step; the
        step it was made at."""
        run = on_rank0(self._run_id)
        setup = self.plan.setup
        newest = on_rank0(
            lambda: checkpoint_files.verify_newest(self.checkpoints, "lm", self.plan.model, setup.precision)
        )
        if newest is None:
            ppo.remote.begin(run, 0)
            return 0
        manifest = checkpoint_files.read_manifest(newest)
        self.batches.load_state_dict(manifest.state["batches"])
        ppo.remote.begin(run, manifest.state["critic_updates"])
        checkpoint.load(newest, ppo.policy.runner, optimizer=True)
        ppo.pipeline.load_state_dict(manifest.state["pipeline"])
        self.monitor.load_state_dict(manifest.state["monitor"])
        if self.monitor.kl_raised:
            ppo.pipeline.kl_controller.value = manifest.state["kl_coefficient"]
        return manifest.step

    def _run_id(self) -> int:
        """A number by which the critic knows this run again."""
        path = self.directory / "run_id"
        if not path.exists():
            write_atomically(path, f"{secrets.randbits(62)}\n")
        return int(path.read_text())


def load_gold_reward(name: str) -> GoldReward:
    """The function behind "module:function"; ConfigError if there is none."""
    found = load_named("gold_reward", name, "module:function")
    if not callable(found):
        raise ConfigError(f"gold_reward = {name!r} is not a function")
    return cast(GoldReward, found)
