"""Settings of every job that trains: optimizer, checkpoints, length of the training, data."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.settings.model import NULL, ModelSetup, by_device
from nemo_eppo.settings.run import ExpManagerConfig


class OptimizerConfig(Config):
    """AdamW with global gradient clipping; norms and biases are not decayed."""

    lr: float = Field(gt=0, le=1)
    """Highest learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of a decaying schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from 0."""
    decay_steps: int | None = Field(None, ge=1)
    """Updates over which a decaying learning rate falls to min_lr; null for all updates of the run. A critic job needs
    a number, because it does not know how long the actor trains: PPO steps x epochs x mini-batches."""
    constant_steps: int = Field(0, ge=0)
    """Number of the last of these updates in which a decaying learning rate stays at min_lr, which it reaches this much
    earlier (as in NeMo's CosineAnnealing)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of Adam's first and second moment, per update."""
    eps: float = Field(1e-8, gt=0)
    """Number added to the denominator of Adam's updates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; 0 for none."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    distributed: Annotated[bool | None, by_device(None, False)] = None
    """Shard optimizer states over data-parallel ranks (Megatron's distributed optimizer); null does so on GPUs if there
    are several of these ranks. A run resumes with the value that it was saved with, under any layout."""
    overlap_grad_reduce: Annotated[bool, by_device(True, False)] = NULL
    """Sum gradients over data-parallel ranks while the backward pass of the last micro-batch still runs; null does so
    on GPUs."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is above lr = {self.lr}")
        if self.constant_steps and self.schedule == "constant":
            raise ValueError(f"constant_steps = {self.constant_steps} needs a schedule that decays, linear or cosine")
        if self.decay_steps is not None:
            self.check_decay(self.decay_steps)
        return self

    def is_distributed(self, replicas: int) -> bool:
        """Tell whether the states are sharded in a job with so many data-parallel ranks."""
        return replicas > 1 if self.distributed is None else self.distributed

    def check_decay(self, updates: int) -> None:
        """Raise ConfigError if warmup_steps and constant_steps leave no update to decay in, of `updates` in the run."""
        total = self.decay_steps or updates
        if self.constant_steps and total - self.constant_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer: warmup_steps = {self.warmup_steps} and constant_steps = {self.constant_steps} leave no "
                f"update to decay in, expected less than {total} together (decay_steps, or all updates of the run)"
            )

    def arrival(self, updates: int) -> int:
        """Return the update at which a decaying learning rate arrives at min_lr in a run of `updates` updates.

        Raises:
            ConfigError: see `check_decay`.
        """
        self.check_decay(updates)
        total = self.decay_steps or updates
        return max(total - self.constant_steps, self.warmup_steps + 1)


class SavingConfig(Config):
    """How checkpoints are written."""

    asynchronous: bool = True
    """Continue to train, or serve, while a checkpoint is written; it appears once it is complete."""


class CheckpointConfig(SavingConfig):
    """When a run is saved, and which of its checkpoints are kept."""

    interval: int = Field(100, ge=0)
    """Steps between checkpoints; 0 saves only after the last step."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    best: str | None = None
    """A validation metric whose best checkpoint is kept too, and linked as checkpoints/best; null for none."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Whether the highest or the lowest value of `best` is the best."""

    @model_validator(mode="after")
    def _best_is_validated(self) -> "CheckpointConfig":
        if self.best is not None and not self.best.startswith("validation/"):
            raise ValueError(f"best = {self.best!r}: expected a metric of the validation, validation/...")
        return self

    def check_best(self, known: tuple[str, ...]) -> None:
        """ConfigError if `best` is not among the `known` metrics."""
        if self.best is not None and self.best not in known:
            raise ConfigError(f"checkpoint.best = {self.best!r}: expected one of {', '.join(known)}")


class FitSettings(Config):
    """How long to train and how often to validate; each step is one update."""

    epochs: int | None = Field(None, ge=1)
    """Passes over the training data; null for one, or for as many as max_steps takes."""
    max_steps: int | None = Field(None, ge=1)
    """Number of steps, which take as many passes over the training data as they need; null for whole epochs."""
    global_batch_size: int = Field(ge=1)
    """Examples (pairs for a reward model) per step, over all ranks."""
    validation_interval: int = Field(0, ge=0)
    """Steps between validations; 0 to validate only at steps that are saved."""

    @model_validator(mode="after")
    def _one_length(self) -> "FitSettings":
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(f"epochs = {self.epochs} and max_steps = {self.max_steps}: expected only one of them")
        return self


class TextDataConfig(Config):
    """Training and validation data of SFT and reward models."""

    train: Path
    """Training examples as JSON lines; .gz is read too."""
    validation: Path
    """Held-out examples in the same format."""
    max_sequence_length: int | None = Field(None, ge=2)
    """Longest prompt + response in tokens; null for the model's window."""
    too_long: Literal["error", "drop"] = "error"
    """Whether a longer example is an error or is dropped."""

    @model_validator(mode="after")
    def _held_out(self) -> "TextDataConfig":
        if self.train == self.validation:
            raise ValueError(f"train and validation are the same file, {self.train}")
        return self

    def longest(self, window: int) -> int:
        """Return the longest prompt + response in tokens; ConfigError if it does not fit into the model's window."""
        if (self.max_sequence_length or 0) > window:
            raise ConfigError(
                f"data.max_sequence_length = {self.max_sequence_length}: expected at most {window}, the model's window"
            )
        return self.max_sequence_length or window


class SFTConfig(Config):
    """The SFT job (conf/gpt_sft.yaml)."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0, lt=2**31)
    """Seed of fresh weights and of the order of examples."""
    model: ModelSetup
    data: TextDataConfig
    """Files of rows {"prompt", "response"}."""
    answer_only_loss: bool = True
    """Learn the responses only; false learns the prompts as well, all tokens but the first."""
    fit: FitSettings
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig
