"""Builds Megatron's data-parallel wrapper, optimizer and learning-rate schedule from one config."""

from typing import Any, Literal

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from pydantic import Field, model_validator
from torch import nn

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.megatron import device
from nemo_eppo.models.model_config import DTYPES, Precision

# keys of a parameter group that come from the config; the scheduler sets lr and weight decay
_SETTINGS = ("max_lr", "min_lr", "betas", "eps")


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
    """Last of these updates that a decaying learning rate stays at min_lr, where it arrives so many updates earlier
    (as in NeMo's CosineAnnealing)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's first and second moment, per update."""
    eps: float = Field(1e-8, gt=0)
    """Number added to the denominator of Adam's updates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; 0 for none."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    distributed: bool = False
    """Shard optimizer states over data-parallel ranks (Megatron's distributed optimizer; GPUs only)."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is above lr = {self.lr}")
        if self.constant_steps and self.schedule == "constant":
            raise ValueError(f"constant_steps = {self.constant_steps} needs a schedule that decays, linear or cosine")
        if self.decay_steps is not None:
            self.arrival(self.decay_steps)
        if self.distributed and not device.on_gpu():
            raise ValueError(
                "distributed = true needs GPUs: its checkpoints cannot be loaded without TransformerEngine"
            )
        return self

    def arrival(self, updates: int) -> int:
        """Return the update at which a decaying learning rate arrives at min_lr in a run of `updates` updates.

        Raises:
            ConfigError: warmup_steps and constant_steps leave no update to decay in.
        """
        total = self.decay_steps or updates
        if self.constant_steps and total - self.constant_steps <= self.warmup_steps:
            raise ConfigError(
                f"optimizer: warmup_steps = {self.warmup_steps} and constant_steps = {self.constant_steps} leave no "
                f"update to decay in, expected less than {total} together (decay_steps, or all updates of the run)"
            )
        return max(total - self.constant_steps, self.warmup_steps + 1)


def wrap_data_parallel(chunks: list[nn.Module], optimizer: OptimizerConfig, precision: Precision) -> list[Any]:
    """Wrap every chunk in Megatron's DDP, which sums gradients, in fp32, after the last micro-batch."""
    config: Any = chunks[0].config
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=precision != "fp32", use_distributed_optimizer=optimizer.distributed
            ),
            module=chunk,
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    chunks: list[Any], config: OptimizerConfig, precision: Precision, total_steps: int
) -> tuple[Any, OptimizerParamScheduler]:
    """Build Megatron's optimizer over DDP-wrapped chunks, and the scheduler of its learning rate and weight decay.

    Args:
        total_steps: updates of the run, over which a decaying schedule reaches min_lr unless `decay_steps` is set.

    Raises:
        ConfigError: see `OptimizerConfig.arrival`.
    """
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=precision == "bf16",
            params_dtype=DTYPES[precision],
            use_distributed_optimizer=config.distributed,
        ),
        chunks,
    )
    if precision == "bf16" and not config.distributed:
        for part in optimizer.chained_optimizers:
            _give_main_copies_to_heads(part)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if config.warmup_steps else config.lr,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.arrival(total_steps),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,  # the scheduler is what applies the multipliers that spare norms and biases
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # settings are always this job's, see `load_state`
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def allocate_state(optimizer: Any) -> None:
    """Allocate Adam's moments, as zeros, which the first update would do: so what is free is what stays free."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:  # a pipeline stage without adapters
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):  # they count updates for each parameter
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))


def load_state(
    optimizer: Any, scheduler: OptimizerParamScheduler, optimizer_state: dict[str, Any], scheduler_state: dict[str, Any]
) -> None:
    """Resume with a checkpoint's moments and number of updates, but this job's settings, which may have changed."""
    settings = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    optimizer.load_state_dict(optimizer_state)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    scheduler.load_state_dict(scheduler_state)


def _give_main_copies_to_heads(optimizer: Any) -> None:
    # megatron-core's bf16 optimizer cannot checkpoint fp32 parameters (0.16: KeyError): show it heads as others:
    # a model's parameter and an updated main copy. They have to be the last of their group, as in its lists.
    for group, model, main, fp32 in zip(
        optimizer.param_groups,
        optimizer.float16_groups,
        optimizer.fp32_from_float16_groups,
        optimizer.fp32_from_fp32_groups,
        strict=True,
    ):
        first = len(group["params"]) - len(fp32)
        for index, parameter in enumerate(fp32, start=first):
            if group["params"][index] is not parameter:
                raise RuntimeError("an fp32 parameter stands before a bf16 one: optimizer states would be mixed up")
            parameter.main_param = group["params"][index] = parameter.detach().clone()
            model.append(parameter)
            main.append(parameter.main_param)
        fp32.clear()
