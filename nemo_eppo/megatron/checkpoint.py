"""Saves weights and optimizer of a running job to a checkpoint and loads them, under any layout."""

import multiprocessing.process
import os
import signal
from collections import ChainMap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import lora
from nemo_eppo.megatron.collectives import all_or_none, on_rank0
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.optimizer import allocate_state, load_state
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.runtime import control_group
from nemo_eppo.models.checkpoint_files import (
    WEIGHTS,
    Manifest,
    compare,
    complete,
    complete_in,
    digests,
    latest,
    note_digests,
    read_manifest,
    start,
    stored_precision,
)
from nemo_eppo.models.stored_pickles import read_metadata, refusals, refuse_code
from nemo_eppo.settings.model import Head, ModelConfig, Precision

_QUANTISED = "_extra_state"  # states of fp8 training, which is not used; TransformerEngine would unpickle them


def save(directory: Path, runner: ModelRunner, manifest: Manifest, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint and wait until it is complete; collective over all ranks.

    Args:
        directory: path of the checkpoint; an existing one is replaced once the new one is complete.
        manifest: what to record; `files` and `lora` are filled in here. The optimizer is saved if `manifest.optimizer`.
        tokenizer: Hugging Face directory whose tokenizer is copied into the checkpoint; None for none.
    """
    request, manifest, incomplete = begin(directory, runner, manifest)
    request.execute_sync()
    if dist.get_rank() == 0:
        complete(incomplete, directory, manifest, tokenizer)
    dist.barrier(control_group())
    return directory


def begin(directory: Path, runner: ModelRunner, manifest: Manifest) -> tuple[AsyncRequest, Manifest, Path]:
    """Prepare a checkpoint; collective over all ranks.

    Returns:
        the request that writes the weights, the manifest with `lora` filled in, and the temporary directory.
    """
    incomplete = on_rank0(lambda: start(directory))
    request = dist_checkpointing.save(
        _sharded_state(runner, manifest.optimizer, is_loading=False),
        str(incomplete / WEIGHTS),
        FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
        ),
        async_sharded_save=True,
    )
    if request.async_fn is not None:  # this rank writes
        write, stage = partial(_write_and_note_digests, incomplete, request.async_fn, os.getpid()), request.preload_fn
        staged: list[Any] = []  # keeps the pinned memory that the forked writer reads: torch would reuse it

        def stage_and_keep() -> Any:
            staged.append(stage())
            return staged[-1]

        request = request._replace(async_fn=write, preload_fn=stage_and_keep)
    return request, manifest.model_copy(update={"lora": lora.attached(runner.chunks)}), incomplete


def verify(directory: Path) -> Manifest:
    """Verify a checkpoint as `checkpoint_files.verify` does, sharing its files out to the ranks; collective."""
    manifest = on_rank0(lambda: read_manifest(directory))
    names = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
    own = names[dist.get_rank() :: dist.get_world_size()]
    found: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, all_or_none(lambda: digests(directory, own)), group=control_group())
    compare(directory, manifest, ChainMap(*found))
    return manifest


def verify_newest(folder: Path, head: Head, model: ModelConfig, precision: Precision) -> Path | None:
    """Find and `verify` the newest checkpoint of a run that resumes with the given model; collective.

    Raises:
        ConfigError: it is damaged (the message names the file, and how to resume from the checkpoint before), or holds
            another model (the message names every difference).
    """
    newest = on_rank0(lambda: latest(folder))
    if newest is None:
        return None
    try:
        manifest = verify(newest)
    except ConfigError as error:
        others = [path for path in complete_in(folder) if path != newest]
        then = f"to resume from the one before, {others[-1].name}" if others else "it is the only one; to start anew"
        raise ConfigError(f"{error}\n{then}: mv {newest} {folder / f'damaged_{newest.name}'}") from None
    saved = {**manifest.model.model_dump(), "head": manifest.head, "precision": stored_precision(newest)}
    now = {**model.model_dump(), "head": head, "precision": precision}
    if changed := [f"{name} = {saved[name]!r}, now {value!r}" for name, value in now.items() if saved[name] != value]:
        raise ConfigError(
            f"{newest} holds another model than the settings ({'; '.join(changed)}): a run resumes with its own model; "
            "choose another run directory for this one"
        )
    return newest


def load(directory: Path, runner: ModelRunner, *, optimizer: bool = False, fresh_head: bool = False) -> Manifest:
    """Load weights, and optionally the optimizer, under this job's layout; collective over all ranks.

    Args:
        optimizer: resume training, with the saved adapters and this job's settings of optimizer and schedule. Without
            it, adapters are merged into the weights.
        fresh_head: leave the scalar head as it was initialised (a reward model that starts from a language model).

    Raises:
        ConfigError: see `read_manifest`; something in it would run code (the message names it); or training is to
            resume, but the optimizer was not saved, or was saved with other adapters, in another precision, or sharded
            where this one is not, or the other way round.
    """
    manifest = on_rank0(lambda: read_manifest(directory))  # on one rank: it checks the size of every file
    if optimizer:
        _check_resumable(directory, manifest, runner)
    to_merge = None if optimizer else manifest.lora
    if to_merge is not None:
        lora.attach(runner.chunks, to_merge)
    state = _sharded_state(runner, optimizer, is_loading=True)
    if fresh_head:
        for name in [name for name in state if name.startswith("chunk")]:
            state[name] = {key: value for key, value in state[name].items() if not key.startswith("head.")}
    refuse_code(directory / WEIGHTS)
    with refusals(directory / WEIGHTS):
        loaded = dist_checkpointing.load(
            state,
            str(directory / WEIGHTS),
            FullyParallelLoadStrategyWrapper(
                get_default_load_sharded_strategy(str(directory / WEIGHTS)),
                parallel_state.get_data_parallel_group(with_context_parallel=True),
            ),
        )
    for index, chunk in enumerate(runner.chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"chunk{index}"], strict=False)
        wrong = [key for key in missing if not key.endswith(_QUANTISED) and not (fresh_head and "head." in key)]
        if wrong or unexpected:
            raise ConfigError(f"{directory} does not fit the model: missing {wrong}, unexpected {unexpected}")
    if to_merge is not None:
        lora.merge(runner.chunks)
    if optimizer:
        load_state(runner.optimizer, runner.scheduler, loaded["optimizer"], loaded["scheduler"])
    elif runner.optimizer is not None:
        runner.optimizer.reload_model_params()
    return manifest


def _check_resumable(directory: Path, manifest: Manifest, runner: ModelRunner) -> None:
    """Raise ConfigError if training cannot resume from a checkpoint with this job's settings, see `load`."""
    if not manifest.optimizer:
        raise ConfigError(f"{directory} holds no optimizer state: training cannot resume from it")
    precision, ddp = "bf16" if runner.config.bf16 else "fp32", runner.chunks[0].ddp_config
    for setting, saved, now in (
        ("model.lora", manifest.lora, lora.attached(runner.chunks)),
        ("model.precision", stored_precision(directory), precision),
        ("optimizer.distributed", is_sharded(directory), ddp.use_distributed_optimizer),
    ):
        if saved != now:
            raise ConfigError(
                f"{directory} was saved with {setting} = {saved}; training cannot resume from it with {now}"
            )


def _write_and_note_digests(
    incomplete: Path, write: Callable[..., None], job: int, rank: int, buckets: list[tuple[str, str, Any]], results: Any
) -> None:
    """Replace megatron-core's function that writes a rank's files (path, name, data), in a process of its own."""
    if os.getpid() != job:
        signal.signal(signal.SIGCHLD, _end_after_lost_worker)
    write(rank, buckets, results)  # an error goes into `results`
    with suppress(OSError):  # no digests of files that could not be written; `seal` adds missing digests, or fails
        note_digests(incomplete, [f"{WEIGHTS}/{name}" for _, name, _ in buckets], rank)


def _end_after_lost_worker(signum: int, frame: Any) -> None:
    """End the writer process as failed if one of its workers was killed (a handler of SIGCHLD): megatron-core (0.16)
    would wait for the worker, and the job for the writer, for ever."""
    if any(worker.exitcode for worker in multiprocessing.process._children.copy()):  # type: ignore[attr-defined]
        os._exit(1)


def is_sharded(directory: Path) -> bool:
    """Tell whether a checkpoint was saved by a distributed optimizer, which names fp32 weights otherwise."""
    return any(
        name.startswith("optimizer.state.param.") for name in read_metadata(directory / WEIGHTS).state_dict_metadata
    )


def _sharded_state(runner: ModelRunner, optimizer: bool, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",  # the only one (0.16) that loads under any layout
    }
    state: dict[str, Any] = {}
    for index, chunk in enumerate(runner.chunks):
        entries = unwrap(chunk).sharded_state_dict(metadata=metadata).items()
        state[f"chunk{index}"] = {key: value for key, value in entries if not key.endswith(_QUANTISED)}
    if optimizer:
        if is_loading:
            allocate_state(runner.optimizer)
        state["optimizer"] = runner.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
        state["scheduler"] = runner.scheduler.state_dict()
    return state
