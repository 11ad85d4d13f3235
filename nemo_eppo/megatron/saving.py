"""Writes the checkpoints of a run while training continues, and removes old ones."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nemo_eppo.files import disk_errors_name, remove_directory, remove_incomplete, replacing
from nemo_eppo.megatron import checkpoint
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.training import CheckpointConfig

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run's directory."""
BEST = "best"


def due(step: int, interval: int) -> bool:
    """Tell whether `step` is a multiple of `interval`; no step is for interval 0."""
    return interval > 0 and step % interval == 0


class CheckpointSaver:
    """Writes the checkpoints `step_*` of one run. All methods but `path` are collective over the ranks of the job.

    Writing has two stages: a child process of every rank writes the weights as they were at `save`; then a thread of
    rank 0 adds the manifest and renames the directory, and only then does the checkpoint exist.

    Args:
        folder: the directory of the run's checkpoints.
        tokenizer: a directory whose tokenizer files each checkpoint gets; None for none.
        asynchronous: continue while a checkpoint is written.
    """

    def __init__(self, folder: Path, tokenizer: Path | None, asynchronous: bool) -> None:
        self._folder, self._tokenizer, self._asynchronous = folder, tokenizer, asynchronous
        self._writing = AsyncCallsQueue()
        self._pending = False  # whether a checkpoint may not be complete yet; the same on all ranks
        self._sealing: Future[None] | None = None  # on rank 0: manifest and renaming of the last checkpoint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if dist.get_rank() == 0:
            remove_incomplete(folder, "step_*")

    def path(self, step: int) -> Path:
        """Say where the checkpoint of a step is, or would be."""
        return self._folder / f"step_{step:06d}"

    def save(
        self,
        runner: ModelRunner,
        manifest: checkpoint_files.Manifest,
        *,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> None:
        """Save the run as it is now, as the checkpoint of the manifest's step.

        Args:
            before: called by rank 0, in another thread, before the checkpoint appears. An error in it is raised by the
                next call.
            after: likewise, after the checkpoint has appeared.
        """
        self.finish()
        directory = self.path(manifest.step)
        with disk_errors_name(self._folder):
            request, complete_manifest, incomplete = checkpoint.begin(directory, runner, manifest)

        def seal() -> None:
            if before is not None:
                before()
            checkpoint_files.complete(incomplete, directory, complete_manifest, self._tokenizer)
            if after is not None:
                after()

        def hand_over() -> None:
            if dist.get_rank() == 0:
                self._sealing = self._thread.submit(seal)

        request.add_finalize_fn(hand_over)
        self._writing.schedule_async_request(request)
        self._pending = True
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Let a checkpoint that is being written enter its next stage; call it after each step."""
        if self._pending:
            with disk_errors_name(self._folder):
                self._writing.maybe_finalize_async_calls(blocking=False)
                on_rank0(lambda: self._sealing.result() if self._sealing and self._sealing.done() else None)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete."""
        with disk_errors_name(self._folder):
            self._writing.maybe_finalize_async_calls(blocking=True)
            sealing, self._sealing, self._pending = self._sealing, None, False  # its error is raised once
            on_rank0(lambda: sealing.result() if sealing else None)


def tidy(folder: Path, config: CheckpointConfig) -> None:
    """Remove all checkpoints but the newest and the best, and link the best as `best`; on one rank."""
    saved = checkpoint_files.complete_in(folder)
    kept = set(saved[-config.keep :])
    if config.best is not None:
        sign = 1 if config.best_is == "highest" else -1
        metrics = {path: checkpoint_files.read_manifest(path).metrics for path in saved}
        values = {path: found[config.best] * sign for path, found in metrics.items() if config.best in found}
        if values:  # none if `best` was set after these were saved
            best = max(values, key=values.__getitem__)
            kept.add(best)
            with replacing(folder / BEST) as link:
                link.symlink_to(best.name)
    for path in saved:
        if path not in kept:
            remove_directory(path)
