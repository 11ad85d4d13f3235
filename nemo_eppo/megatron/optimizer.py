"""Builds Megatron's data-parallel wrapper, optimizer and learning-rate schedule from one config."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.optimizer_shards import sharded_states
from nemo_eppo.models.numerics import DTYPES
from nemo_eppo.settings.model import Precision
from nemo_eppo.settings.training import OptimizerConfig

# keys of a parameter group that come from the config or this machine; the scheduler sets lr and weight decay
_SETTINGS = ("max_lr", "min_lr", "betas", "eps", "fused")


def wrap_data_parallel(chunks: list[nn.Module], optimizer: OptimizerConfig, precision: Precision) -> list[Any]:
    """Wrap every chunk in Megatron's DDP, which sums gradients, in fp32, in or after the last backward pass.

    A distributed optimizer's weights are gathered at the end of its update, not during the next forward pass: the
    reference, generation engines, checkpoints and the log-probabilities' projection read them outside of modules'
    forward passes, where Megatron would not wait for them.
    """
    config: Any = chunks[0].config
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=precision != "fp32",
                overlap_grad_reduce=optimizer.overlap_grad_reduce,
                use_distributed_optimizer=optimizer.is_distributed(parallel_state.get_data_parallel_world_size()),
            ),
            module=chunk,
            # as one bucket, a bf16 chunk and its fp32 head would be gathered in one call, which mixes them up with gloo
            disable_bucketing=index > 0 and len({p.dtype for p in chunk.parameters()}) == 1,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if optimizer.overlap_grad_reduce:  # else gradients would be summed after every micro-batch
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
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
    distributed: bool = chunks[0].ddp_config.use_distributed_optimizer
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
            use_distributed_optimizer=distributed,
        ),
        chunks,
    )
    for part in optimizer.chained_optimizers:
        if distributed:
            _fix_state_lookup(part)
            part.sharded_param_state_fully_reshardable = partial(sharded_states, part)
        elif precision == "bf16":
            _give_main_copies_to_heads(part)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True  # one pass over memory, and no temporary tensors
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
    """Allocate Adam's moments, as zeros, before the first update does, so that memory that is free now stays free."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:  # a pipeline stage without adapters
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):  # they count updates for each parameter
            for parameter, state in part.optimizer.state.items():
                state.setdefault("step", torch.zeros((), device=parameter.device))


def train_head_only(chunks: list[nn.Module], optimizer: Any) -> None:
    """Remove all parameters but the head's from the optimizer, which makes training a linear probe. Gradients are still
    computed everywhere, so every layout works as in full training; only the head's are clipped and applied."""
    heads = set()
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if name.startswith("head."):
                heads |= {id(parameter), id(getattr(parameter, "main_param", None))}
    for part in optimizer.chained_optimizers:
        for group in part.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in heads]


def load_state(
    optimizer: Any, scheduler: OptimizerParamScheduler, optimizer_state: dict[str, Any], scheduler_state: dict[str, Any]
) -> None:
    """Resume with a checkpoint's moments and number of updates, but this job's settings, which may have changed."""
    settings = [dict(group) for group in optimizer.param_groups]
    is_sharded = optimizer_state.pop("param_state", None) is not None  # states were loaded in place
    if not is_sharded:
        _move_update_count(optimizer, optimizer_state)
    optimizer.load_state_dict(optimizer_state)
    for part in optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items() if part.optimizer is not None else ():
            if "step" in state:  # a fused update counts on the device; megatron-core (0.16) may set one tensor for all
                state["step"] = state["step"].to(parameter.device, copy=True)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: own[name] for name in _SETTINGS if name in own})
        for name in own.keys() - group.keys():  # of this machine's Adam, which may not be the one that was saved
            group[name] = own[name]
    scheduler.num_steps = 0  # megatron-core (0.16) adds the checkpoint's updates to those made
    scheduler.load_state_dict(scheduler_state)


def _move_update_count(optimizer: Any, saved: dict[str, Any]) -> None:
    """Move a checkpoint's number of updates to where this machine's Adam keeps it: torch's for each parameter, which
    megatron-core (0.16) saves as one `common_step`; TransformerEngine's and Apex's FusedAdam for each group."""
    parts = optimizer.chained_optimizers
    for part, state in zip(parts, [saved] if len(parts) == 1 else [saved[key] for key in sorted(saved)], strict=True):
        adam = state.get("optimizer", state)
        in_groups = [group.pop("step") for group in adam["param_groups"] if "step" in group]
        count = adam["state"].pop("common_step", in_groups[0] if in_groups else 0)
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            adam["state"]["common_step"] = torch.tensor(float(count))
        else:
            for group in adam["param_groups"]:
                group["step"] = int(count)


def _fix_state_lookup(optimizer: Any) -> None:
    # megatron-core's distributed optimizer (0.16) puts fp32 parameters, our heads, before a group's others, but expects
    # their states behind those of the others.
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for group, (fp32, others) in enumerate(groups):
        for place, parameter in enumerate([*fp32, *others]):
            optimizer.model_param_group_index_map[parameter] = (group, place)


def _give_main_copies_to_heads(optimizer: Any) -> None:
    # megatron-core's bf16 optimizer cannot checkpoint fp32 parameters (0.16: KeyError). So give heads an updated main
    # copy, as bf16 parameters have. They have to be the last of their group, as in the optimizer's lists.
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
