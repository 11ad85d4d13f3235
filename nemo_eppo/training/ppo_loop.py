"""The loop over PPO steps with validation, metrics, rollout files, checkpoints and resume."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_eppo.config import ConfigError, RunStopped
from nemo_eppo.megatron import checkpoint
from nemo_eppo.megatron.collectives import PeerError, on_rank0
from nemo_eppo.megatron.saving import CHECKPOINTS, CheckpointSaver, due, tidy
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.metrics import MetricsLogger
from nemo_eppo.observability.progress import PPO_COLUMNS, Progress
from nemo_eppo.observability.recorder import record, recorded_steps
from nemo_eppo.observability.run import Run, run_id
from nemo_eppo.rewards.functions import RewardFunctionError
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import RolloutBatch, step_seed
from nemo_eppo.servers.client import ServerUnavailable
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.training.ppo import PPO
from nemo_eppo.training.ppo_job import PPOJob
from nemo_eppo.training.recovery import Recovery
from nemo_eppo.training.stopping import ENDS, RESUMES, SAVED, StopWatch


def train_ppo(config: PPOConfig, run: Run) -> None:
    """Run the actor job."""
    job = PPOJob(config, run)
    with ExitStack() as stack:
        ppo = job.build(stack)
        recovery = Recovery(job.remotes, config.servers, run.logger)
        loop = PPOLoop(job, ppo)
        watch = stack.enter_context(StopWatch(run))
        while True:
            try:
                loop.run(watch)
                return
            except (ServerUnavailable, RewardFunctionError, PeerError) as error:
                loop = _resumed(job, ppo, loop, recovery, watch, error)


def _resumed(
    job: PPOJob,
    ppo: PPO,
    loop: "PPOLoop",
    recovery: Recovery,
    watch: StopWatch,
    error: ServerUnavailable | RewardFunctionError | PeerError,
) -> "PPOLoop":
    """Resume after a lost step; if another server is lost while resuming, wait for it, too."""
    while True:
        recovery.recover(error, loop.done, loop.save_lost, watch)
        ppo.timers.discard()
        ppo.updating = True  # nothing may be saved before policy and critic are back at the same step
        try:
            return PPOLoop(job, ppo)
        except (ServerUnavailable, PeerError) as next_error:
            error = next_error


class PPOLoop:
    """One run on all ranks. If the run directory holds a checkpoint, the constructor resumes the run from it."""

    def __init__(self, job: PPOJob, ppo: PPO) -> None:
        self.config, self.run_files, self.plan = job.config, job.run_files, job.plan
        self.ppo, self.monitor, self.prompts, self.batches = ppo, job.monitor, job.prompts, job.batches
        self.validation_prompts = job.validation_prompts
        self.checkpoints = self.run_files.directory / CHECKPOINTS
        self.saver = CheckpointSaver(self.checkpoints, self.plan.tokenizer_path, self.config.checkpoint.asynchronous)
        ppo.policy.engine.sleep()  # loading takes its memory; after a lost step the engine may be awake
        self._stopped_by_monitor = False
        self._reference = on_rank0(job.plan.identity)
        self.done = self.saved = self._resume()
        self._state = self._state_now()

    def run(self, watch: StopWatch) -> None:
        """Train to the last step, or to where `watch` or the monitor ends the run."""
        config, ppo, step = self.config, self.ppo, self.done
        last = self.done if self._stopped_by_monitor and config.monitor.may_stop else config.ppo.max_steps
        stop, is_last = "", False
        if self.done >= last:
            why = "the monitor ended the run" if last < config.ppo.max_steps else f"ppo.max_steps = {last}"
            self.run_files.logger.info("%d steps are done, %s: nothing is left to do", self.done, why)
        watch.begin()
        with ExitStack() as stack:
            metrics = self._open_files(stack)
            progress = stack.enter_context(
                Progress(
                    "PPO", last, PPO_COLUMNS, done=self.done, disable=dist.get_rank() != 0, phase=ppo.timers.running
                )
            )
            if self.done == 0 and (initial := self._validate(0)):
                if metrics is not None:
                    metrics.log(0, initial)
                if not config.validation.greedy:  # greedy responses have other energies than sampled ones
                    self.monitor.observe_sft(initial["validation/energy_loss"])
            for step in range(self.done + 1, last + 1):
                result = ppo.step(step, [self.prompts[index] for index in next(self.batches)])
                started = time.perf_counter()
                row = result.metrics
                self._stopped_by_monitor = self._watch(step, row, result.latents)
                is_last = self._stopped_by_monitor or step == last
                self._state = self._state_now()
                if (stop := watch.due()) and not is_last:
                    self.run_files.logger.info(ENDS, stop)
                save = stop or is_last or due(step, config.checkpoint.interval)
                if metrics is not None:
                    rows = rollout_rows(result.batch, result.samples, result.ledger.rows())
                    record(self.run_files.directory / "rollouts", step, rows[: config.record_rollouts])
                validation = {}
                if is_last or due(step, config.validation.interval) or (save and config.checkpoint.best):
                    validation = self._validate(step)
                row |= validation
                row["seconds/after_step"] = time.perf_counter() - started
                if metrics is not None:
                    metrics.log(step, row)  # before the checkpoint: resuming can drop rows, not restore them
                if save:
                    self._save(step, validation)
                self.saver.poll()
                self.done = step
                progress.update(step, row)
                if is_last or stop:
                    break
            self.saver.finish()
            ppo.timers.close()
        self.run_files.logger.info(SAVED, "PPO", step, last, self.saver.path(step))
        if stop and not is_last:
            raise RunStopped

    def _open_files(self, stack: ExitStack) -> MetricsLogger | None:
        if dist.get_rank():
            return None
        for folder in ("rollouts", "validation"):
            for step, file in recorded_steps(self.run_files.directory / folder).items():
                if step > self.done:  # the checkpoint that the run resumes from is older
                    file.unlink()
        return stack.enter_context(self.run_files.open_metrics(self.done or None))

    def _validate(self, step: int) -> dict[str, float]:
        """Roll out on the validation prompts, write rows to validation/ and return means as metrics."""
        if not self.validation_prompts:
            return {}
        ppo, sampling = self.ppo, self.config.generation
        if self.config.validation.greedy:
            sampling = sampling.as_greedy
        ppo.policy.refit()
        rollout = ppo.roll_out(self.validation_prompts, sampling, step_seed(self.config.seed, 0))
        ppo.policy.engine.sleep()
        rewards, observed = ppo.ask(rollout)
        energies = ppo.policy.read(rollout.batch).energies
        columns = {
            "proxy_reward": ppo.pipeline.combine(rewards().scores, ppo.sources.columns).tolist(),
            "energy_loss": energies.double().sum(1).tolist(),
            "response_length": [len(sample.token_ids) for sample in rollout.samples],
            **{f"{name}_reward": answer().tolist() for name, answer in observed.items()},
        }
        if dist.get_rank() == 0:
            measured = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            rows = rollout_rows(rollout.batch, rollout.samples, measured)
            record(self.run_files.directory / "validation", step, rows)
        return {f"validation/{name}": sum(column) / len(column) for name, column in columns.items()}

    def _watch(self, step: int, row: dict[str, float], latents: torch.Tensor | None) -> bool:
        """Give a step's metrics `row` to the hacking monitor, add its own, and return whether it stops the run."""
        verdict = on_rank0(lambda: self.monitor.observe(step, row, latents))  # the same for all ranks
        row |= verdict.metrics
        actions = [alarm.action for alarm in verdict.alarms]
        if "raise_kl" in actions:
            kl = self.ppo.pipeline.kl
            kl.set_coefficient(self.monitor.raised_kl(kl.coefficient))
        if dist.get_rank() == 0:
            for alarm in verdict.alarms:
                self.run_files.logger.warning("%s", alarm)
        return "stop" in actions

    def save_lost(self) -> int | None:
        """Save the finished steps after a later one was lost; return the newest saved step, None if there is none.

        Nothing is saved if the lost step had begun to change weights, or if the critic's server is lost.
        """
        with suppress(ServerUnavailable, PeerError):  # a checkpoint under way is lost with its critic's
            self.saver.finish()
        if self.done > self.saved and not self.ppo.updating:
            with suppress(ServerUnavailable, PeerError):
                self._save(self.done, {})
                self.saver.finish()
        return on_rank0(self._newest_step)

    def _newest_step(self) -> int | None:
        newest = checkpoint_files.latest(self.checkpoints)
        return None if newest is None else checkpoint_files.read_manifest(newest).step

    def _state_now(self) -> dict[str, Any]:
        """Return the state of everything but weights, optimizers and critic, as a checkpoint keeps it."""
        return {
            "batches": self.batches.state_dict(),
            "pipeline": self.ppo.pipeline.state_dict(),
            "monitor": self.monitor.state_dict(),
            "ended": self._stopped_by_monitor,
            "reference": self._reference,
            "rewards": self._scales(),
        }

    def _scales(self) -> list[list[float]]:
        """Return mean and standard deviation of each reward, which tell one reward model from another."""
        return [[column.mean, column.std] for column in self.ppo.sources.columns]

    def _save(self, step: int, validation: dict[str, float]) -> None:
        """Save actor and critic. The actor's checkpoint appears after the critic's, so that every actor that can be
        resumed finds its critic; each deletes a checkpoint only when the other no longer needs it."""
        self.saver.finish()
        ppo, state, critic_saved = self.ppo, {}, None
        if ppo.critic is not None:
            path, critic_saved = ppo.critic.save(on_rank0(self._critics_needed))
            state = {"critic_updates": ppo.critic.updates, "critic_checkpoint": path}
        manifest = checkpoint_files.Manifest(
            head="lm",
            step=step,
            model=self.plan.model,
            metrics=validation,
            optimizer=True,
            state=self._state | state,
        )
        self.saver.save(
            ppo.policy.runner,
            manifest,
            before=critic_saved,
            after=lambda: tidy(self.checkpoints, self.config.checkpoint),
        )
        self.saved = step

    def _critics_needed(self) -> list[int]:
        """Return the numbers of critic updates that this run's checkpoints were saved with."""
        saved = checkpoint_files.complete_in(self.checkpoints)
        return [checkpoint_files.read_manifest(path).state["critic_updates"] for path in saved]

    def _resume(self) -> int:
        """Load the newest checkpoint of this run, if there is one, and make the critic go back to its state then.
        Return the number of steps done."""
        ppo, precision = self.ppo, self.plan.setup.precision
        newest = checkpoint.verify_newest(self.checkpoints, "lm", self.plan.model, precision)
        state = checkpoint_files.read_manifest(newest).state if newest is not None else {}
        if newest is not None:
            if ("critic_updates" in state) != (ppo.critic is not None):
                had, has = ("a", "none") if ppo.critic is None else ("no", "one")
                raise ConfigError(
                    f"{newest} was saved by a run with {had} critic, this run has {has}: choose another run directory"
                )
            self.batches.load_state_dict(state["batches"])
            self._stopped_by_monitor = state.get("ended", False)
            self._check_reference(newest, state.get("reference") or self._reference)
            if (before := state.get("rewards", self._scales())) != self._scales():
                self.run_files.logger.warning(
                    "the run of %s had other rewards, by their means and standard deviations %s; they are %s now",
                    *(newest, before, self._scales()),
                )
        if ppo.critic is not None:
            assert self.config.critic is not None
            fresh = self.config.critic.fresh and newest is None
            on_rank0(self._critics_needed)  # a damaged manifest is an error now, not at the first save
            ppo.critic.begin(on_rank0(lambda: run_id(self.run_files.directory)), state.get("critic_updates", 0), fresh)
        if newest is None:
            return 0
        manifest = checkpoint.load(newest, ppo.policy.runner, optimizer=True)
        ppo.pipeline.load_state_dict(state["pipeline"])
        self.monitor.load_state_dict(state["monitor"])
        self.run_files.logger.info(RESUMES, newest, manifest.step, self.config.ppo.max_steps)
        return manifest.step

    def _check_reference(self, checkpoint: Path, before: str | None) -> None:
        """Raise ConfigError if the reference is another model than when the run began; only warn for a Hugging Face
        directory, whose identity also changes when its files are copied."""
        if self._reference == before:
            return
        said = f"{self.plan.source} is not the model that the run of {checkpoint} began with, and compares itself with"
        if isinstance(self.plan.source, Path):
            raise ConfigError(f"{said}: give model.restore_from_path that checkpoint, or choose another run directory")
        self.run_files.logger.warning("%s, or its files were copied", said)


def rollout_rows(
    batch: RolloutBatch, samples: Sequence[Sample], measured: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Return one row per response for rollout files: its text and token ids (EOS included where it finished), how it
    ended, and its numbers in `measured`."""
    return [
        {
            "prompt": sample.prompt,
            "response": sample.response,
            "prompt_ids": tokens[:prompt_length].tolist(),
            "response_ids": list(sample.token_ids),
            "finished": sample.finished,
            "finish_reason": "stop" if sample.finished else "length",
            **({"fields": sample.fields} if sample.fields else {}),
            "response_length": len(sample.token_ids),
            **numbers,
        }
        for tokens, prompt_length, sample, numbers in zip(
            batch.tokens, batch.prompt_lengths, samples, measured, strict=True
        )
    ]
