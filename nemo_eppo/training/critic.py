"""The critic job: serves a value model, trains it on what the actor sends, and can serve a reward model as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_eppo.algorithms.policy import value_loss
from nemo_eppo.config import ConfigError
from nemo_eppo.files import remove_directory
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.collectives import PeerError, on_rank0
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.megatron.saving import CHECKPOINTS, CheckpointSaver
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.protocol import ServerEnding, ServiceError
from nemo_eppo.servers.server import check_server, serve
from nemo_eppo.servers.service import Tensors
from nemo_eppo.settings.critic import SEED, CriticConfig
from nemo_eppo.settings.model import ModelSetup
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.setup import build, plan


class CriticModel:
    """A critic on this job's ranks, which computes values and makes updates; a `Service` for any server or none.

    The constructor checks files and settings; `build` is called once the ranks have joined. Each mini-batch is one
    update; `step` counts updates.

    Args:
        value_clip: see `CriticConfig`.
        seed: seed of fresh weights.
        where: the config key of `setup`, for error messages.
    """

    name = "critic"
    runner: ModelRunner

    def __init__(
        self,
        setup: ModelSetup,
        optimizer: OptimizerConfig,
        value_clip: float | None,
        seed: int = SEED,
        where: str = "model",
    ) -> None:
        self._optimizer, self._value_clip, self._seed = optimizer, value_clip, seed
        self.plan = plan(setup, where)
        self.vocab_size = self.plan.model.vocab_size
        # one more than the model's window, so that the value after the last token of the longest response can be read
        self.max_sequence_length = self.plan.model.max_sequence_length + 1
        self.endpoints: dict[str, Callable[[Tensors], Any]] = {
            "critic_begin": self._begin,
            "critic_infer": self._infer,
            "critic_train": self._train,
            "critic_save": self._save,
            "critic_saved": self._saved,
        }

    def build(self, directory: Path, asynchronous: bool) -> None:
        """Load the newest checkpoint in the run directory `directory`, or start afresh if it has none; collective.

        Args:
            asynchronous: whether `critic_save` returns while the checkpoint is still being written.
        """
        self._folder = directory / CHECKPOINTS
        self._saver = CheckpointSaver(self._folder, self.plan.tokenizer_path, asynchronous)
        precision = self.plan.setup.precision
        self._build(checkpoint.verify_newest(self._folder, "scalar", self.plan.model, precision))

    @property
    def step(self) -> int:
        """Number of updates made so far."""
        return self._step

    def status(self) -> dict[str, Any]:
        """Return the tokenizer's digest for the status reply."""
        return {"tokenizer": self.plan.tokenizer.digest}

    def close(self) -> None:
        """Wait until a checkpoint that is being written is complete."""
        self._saver.finish()

    def _build(self, resume: Path | None) -> None:
        """Build model and optimizer as the checkpoint `resume` has them; None for those of the run's start."""
        with runtime.seeded(self._seed):
            self.runner = build(self.plan, "scalar", optimizer=self._optimizer, total_steps=1, resume=resume)
        manifest = checkpoint_files.read_manifest(resume) if resume else None
        self._step = manifest.step if manifest else 0
        self._run: int | None = manifest.state["run"] if manifest else None

    def _begin(self, request: Tensors) -> int:
        step, run = int(request["step"]), int(request["run"])
        if (step or self._step) and self._run not in (None, run):
            if step or not request["fresh"]:
                raise ServiceError(
                    f"the critic has made {self._step} updates of another run: resume the actor from that run's "
                    "directory, start the critic with a new one, or let it begin anew with critic.fresh=true"
                )
            self._set_checkpoints_aside()
        if step != self._step:
            self._go_back(step)
        self._run = run
        return self._step

    def _set_checkpoints_aside(self) -> None:
        """Rename the folder with the checkpoints of another run, so that the next run starts without any."""
        self._saver.finish()
        aside = self._folder.with_name(f"{CHECKPOINTS}_of_run_{self._run}")
        if on_rank0(aside.exists):
            raise ServiceError(f"the critic's checkpoints of run {self._run} would become {aside}, which exists")
        on_rank0(lambda: self._folder.rename(aside) if self._folder.exists() else None)

    def _go_back(self, step: int) -> None:
        """Load the checkpoint of update `step`, 0 for the start of the run, and remove all later ones."""
        self._saver.finish()
        resume = self._saver.path(step) if step else None
        if resume is not None:
            try:
                checkpoint.verify(resume)
            except (ConfigError, PeerError) as error:
                raise ServiceError(f"the critic cannot go back to update {step}: {error}") from None
        del self.runner  # before the new one needs as much memory
        self._build(resume)
        on_rank0(lambda: self._remove_after(step))

    def _remove_after(self, step: int) -> None:
        # later updates are made again: checkpoints of the abandoned ones must not be taken for those of the new ones
        saved = checkpoint_files.complete_in(self._folder)
        for path in saved[saved.index(self._saver.path(step)) + 1 :] if step else saved:
            remove_directory(path)

    def _infer(self, request: Tensors) -> Tensors:
        values, _ = self.runner.infer(request["tokens"], request["lengths"], outputs=1)
        return {"values": values[:, :-1, 0].contiguous()}

    def _train(self, request: Tensors) -> dict[str, float]:
        tokens = float(request["mask"].sum())
        clip = self._value_clip

        def loss_function(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            loss, clipped = value_loss(output[:, :-1, 0], rows["values"], rows["returns"], rows["mask"], clip, tokens)
            return loss, {"value_clip_fraction": clipped / tokens}

        rows = {name: request[name] for name in ("tokens", "lengths", "returns", "values", "mask")}
        try:
            metrics = self.runner.train_step(rows, loss_function)
        except (FloatingPointError, ValueError) as error:
            raise ServiceError(f"critic update {self._step + 1}: {error}") from None
        self._step += 1
        return metrics

    def _save(self, request: Tensors) -> str:
        needed = {self._saver.path(int(step)) for step in (*request["keep"], self._step)}

        def tidy() -> None:
            for path in set(checkpoint_files.complete_in(self._folder)) - needed:
                remove_directory(path)

        manifest = checkpoint_files.Manifest(
            head="scalar", step=self._step, model=self.plan.model, optimizer=True, state={"run": self._run}
        )
        self._saver.save(self.runner, manifest, after=tidy)
        return str(self._saver.path(self._step))

    def _saved(self, request: Tensors) -> str:
        self._saver.finish()
        path = self._saver.path(int(request["step"]))
        if not on_rank0(path.is_dir):
            # the actor takes this for a lost server, and both go back to the newest checkpoints
            raise ServerEnding(f"{path} was not saved")
        return str(path)


class CriticService(CriticModel):
    """The critic as a job of its own; it serves a reward model too if the settings name one."""

    def __init__(self, config: CriticConfig, directory: Path) -> None:
        super().__init__(config.model, config.optimizer, config.value_clip, config.seed)
        self._reward = None
        if config.reward_model is not None:
            self._reward = RewardModel(config.model.beside(config.reward_model), "reward_model")
            self._reward.plan.check_fits("reward_model", self.plan.tokenizer, "the critic")
            self.endpoints |= self._reward.endpoints
        runtime.initialize(config.model.parallel, config.seed)
        self.build(directory, config.checkpoint.asynchronous)
        if self._reward is not None:
            self._reward.build()

    def status(self) -> dict[str, Any]:
        """Return the tokenizer's digest and, if there is a reward model, its statistics."""
        return super().status() | (self._reward.status() if self._reward else {})


def serve_critic(config: CriticConfig, run: Run) -> None:
    """Build the critic and serve until the job is told to stop."""
    if run.rank == 0:
        check_server(config.server)
    service = CriticService(config, run.directory)
    serve(service, ENDPOINTS, config.server, group=runtime.control_group())
    service.close()
    saved = checkpoint_files.latest(run.directory / CHECKPOINTS)
    run.logger.info("the critic ended after update %d; its newest checkpoint is %s", service.step, saved or "not there")
    runtime.shutdown()
