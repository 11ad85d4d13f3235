"""A checkpoint that is written while training goes on: whole, of its step, or an error."""

import gc
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from distributed import run_ranks
from tiny import MODEL, SP2, Layout, build_runner, exported, update
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nemo_eppo.megatron import checkpoint
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.saving import CheckpointSaver
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.training import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=0.01)


def saved_while_training(layout: Layout, folder: Path) -> tuple[list[bool], dict[str, Tensor], dict[str, Tensor]]:
    """Save after one update and train on: whether it was there at once and after a while, and both weights."""
    runner = build_runner(layout, optimizer=OPTIMIZER)
    update(runner, "lm")
    then = {name: tensor.clone() for name, tensor in exported(runner).items()}
    saver = CheckpointSaver(folder, None, asynchronous=True)
    saver.save(runner, checkpoint_files.Manifest(head="lm", step=1, model=MODEL, optimizer=True))
    there = [on_rank0(saver.path(1).exists)]  # not before the first poll
    update(runner, "lm")
    while not on_rank0(saver.path(1).exists):  # the ranks poll equally often
        saver.poll()
    saver.finish()
    checkpoint_files.verify(saver.path(1))
    there.append(saver.path(1).exists())
    checkpoint.load(saver.path(1), runner, optimizer=True)
    return there, then, exported(runner)


def test_a_checkpoint_written_while_training_goes_on_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    for there, then, loaded in run_ranks(saved_while_training, 2, SP2, tmp_path):
        assert there == [False, True]
        assert all(torch.equal(loaded[name], then[name]) for name in then)


def staged_while_written(folder: Path) -> tuple[bool, bool]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    staged: list[weakref.ref[Tensor]] = []
    preload, go_on = FileSystemWriterAsync.preload_tensors, folder / "go_on"
    write = FileSystemWriterAsync.write_preloaded_data

    def preloaded(write_buckets: Any, non_blocking: bool = True) -> Any:
        buckets = preload(write_buckets, non_blocking)
        copies = [tuple((item, tensor.clone()) for item, tensor in data[1]) for *_, data in buckets]
        buckets = [(*place, (data[0], list(copy))) for (*place, data), copy in zip(buckets, copies, strict=True)]
        staged.extend(weakref.ref(tensor) for copy in copies for _, tensor in copy)
        return buckets

    def slow(*args: Any, **kwargs: Any) -> Any:
        while not go_on.exists():
            time.sleep(0.01)
        return write(*args, **kwargs)

    FileSystemWriterAsync.preload_tensors = staticmethod(preloaded)
    FileSystemWriterAsync.write_preloaded_data = staticmethod(slow)
    runner = build_runner({}, optimizer=OPTIMIZER)
    saver = CheckpointSaver(folder, None, asynchronous=True)
    saver.save(runner, checkpoint_files.Manifest(head="lm", step=1, model=MODEL, optimizer=True))
    gc.collect()
    meanwhile = bool(staged) and all(reference() is not None for reference in staged)
    go_on.touch()
    saver.finish()
    gc.collect()
    return meanwhile, any(reference() is not None for reference in staged)


def test_what_a_checkpoint_is_written_from_is_kept_until_it_is_written(tmp_path: Path) -> None:
    """On a GPU that is pinned memory, which the writer shares with this process; torch would give it to others."""
    assert run_ranks(staged_while_written, 1, tmp_path) == [(True, False)]


def saved_by_a_worker_that_is_killed(folder: Path) -> tuple[str, bool]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    FileSystemWriterAsync.write_preloaded_data = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    runner = build_runner({}, optimizer=OPTIMIZER)
    saver = CheckpointSaver(folder, None, asynchronous=True)
    try:
        saver.save(runner, checkpoint_files.Manifest(head="lm", step=1, model=MODEL, optimizer=True))
        saver.finish()
    except CheckpointException as error:
        return str(error), saver.path(1).exists()
    return "", saver.path(1).exists()


def test_a_job_is_told_when_what_writes_its_checkpoint_is_killed(tmp_path: Path) -> None:
    [(said, exists)] = run_ranks(saved_by_a_worker_that_is_killed, 1, tmp_path, timeout=60)
    assert said
    assert not exists
