"""Checkpoints that are complete or do not exist.

A checkpoint is a directory: `weights/` (megatron-core's distributed format: it loads under any layout), `tokenizer/`,
`manifest.json`. It is written under a temporary name, flushed, and renamed; the manifest lists every file with its size
and digest, so that a truncated or altered one is noticed and named before anything is loaded.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from pydantic import Field, ValidationError

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.megatron import lora
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.lora import LoRAConfig
from nemo_eppo.megatron.model import Head, unwrap
from nemo_eppo.megatron.model_config import ModelConfig, Precision
from nemo_eppo.megatron.optimizer import load_state
from nemo_eppo.megatron.runner import ModelRunner

MANIFEST, WEIGHTS, TOKENIZER = "manifest.json", "weights", "tokenizer"
INCOMPLETE = ".incomplete"
_FORMAT = 1
GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    f"tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.model chat_template* {GENERATION}"
)


class FileEntry(Config):
    """One file of a checkpoint."""

    size: int
    sha256: str


class Manifest(Config):
    """What a checkpoint holds."""

    format: int = _FORMAT
    head: Head
    """lm for a policy, scalar for a critic or plain reward model, odin or inform for a reward model of that kind."""
    step: int = Field(ge=0)
    """Updates of the loop that saved it."""
    model: ModelConfig
    lora: LoRAConfig | None = None
    """Adapters beside the model's own weights; `save` fills it in."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Of the validation at this step."""
    optimizer: bool = False
    """Whether optimizer and schedule are in it, so that training can go on."""
    state: dict[str, Any] = Field(default_factory=dict)
    """State of the loop, and what belongs to the model: a reward model's mean and std."""
    files: dict[str, FileEntry] = Field(default_factory=dict)


def read_manifest(directory: Path, head: Head | None = None) -> Manifest:
    """The manifest of a checkpoint whose files are all there and unaltered in size.

    Args:
        head: lm, or scalar for any model that gives numbers in place of words; None for either.

    Raises:
        ConfigError: no checkpoint, another kind of model than `head`, or a file that is missing or truncated (named).
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{directory} is not a checkpoint: it has no {MANIFEST}")
    try:
        manifest = Manifest.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if manifest.format != _FORMAT:
        raise ConfigError(f"{path}: format {manifest.format}, this version reads format {_FORMAT}")
    if head is not None and (manifest.head == "lm") != (head == "lm"):
        raise ConfigError(f"{directory} holds a model with head '{manifest.head}', expected '{head}'")
    for name, entry in manifest.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != entry.size:
            raise ConfigError(f"{directory} is damaged: {name} has {found} bytes, its manifest says {entry.size}")
    return manifest


def verify(directory: Path) -> Manifest:
    """As `read_manifest`, and every file's digest is compared too."""
    manifest = read_manifest(directory)
    for name, digest in _digests(directory, list(manifest.files)).items():
        if digest != manifest.files[name].sha256:
            raise ConfigError(f"{directory} is damaged: the content of {name} is not what its manifest says")
    return manifest


def verify_newest(folder: Path, head: Head, model: ModelConfig, precision: Precision) -> Path | None:
    """The newest checkpoint of a run that goes on with this very model, every digest compared.

    Raises:
        ConfigError: it is damaged (the message names the file, and how to go on from the checkpoint before), or holds
            another model (the message names every difference).
    """
    newest = latest(folder)
    if newest is None:
        return None
    try:
        manifest = verify(newest)
    except ConfigError as error:
        others = [path for path in complete_in(folder) if path != newest]
        then = f"to go on from the one before, {others[-1].name}" if others else "it is the only one; to start anew"
        raise ConfigError(f"{error}\n{then}: mv {newest} {folder / f'damaged_{newest.name}'}") from None
    saved = {**manifest.model.model_dump(), "head": manifest.head, "precision": stored_precision(newest)}
    now = {**model.model_dump(), "head": head, "precision": precision}
    if changed := [f"{name} = {saved[name]!r}, now {value!r}" for name, value in now.items() if saved[name] != value]:
        raise ConfigError(
            f"{newest} holds another model than the settings ({'; '.join(changed)}): a run goes on with its own model; "
            "choose another run directory for this one"
        )
    return newest


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint `step_*` in a directory of checkpoints."""
    found = complete_in(directory)
    return found[-1] if found else None


def complete_in(directory: Path) -> list[Path]:
    """The checkpoints `step_*` in a directory, oldest first."""
    return sorted(path for path in directory.glob("step_*") if (path / MANIFEST).is_file())


def find(path: Path, where: str) -> Path:
    """The checkpoint at `path`, or the newest in it; ConfigError, beginning with `where`, if there is none."""
    if not path.exists():
        raise ConfigError(f"{where}: {path} does not exist")
    if (path / MANIFEST).is_file():
        return path
    newest = latest(path)
    if newest is None:
        raise ConfigError(f"{where}: {path} is no checkpoint and holds none (step_*)")
    return newest


def stored_precision(directory: Path) -> Precision:
    """The precision of the weights in a checkpoint."""
    tensors = dist_checkpointing.load_tensors_metadata(str(directory / WEIGHTS))
    return "bf16" if tensors["embedding.word_embeddings.weight"].dtype == torch.bfloat16 else "fp32"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files of a Hugging Face directory, and the settings of generation, but not the model that
    may lie beside them."""
    target.mkdir(exist_ok=True)
    for pattern in _TOKENIZER_FILES.split():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def save(directory: Path, runner: ModelRunner, manifest: Manifest, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint and wait until it is complete; collective over all ranks.

    Args:
        directory: where the checkpoint will be; an existing one is replaced once the new one is complete.
        manifest: what to record; `files` and `lora` are filled in here. The optimizer is saved if `manifest.optimizer`.
        tokenizer: a Hugging Face directory whose tokenizer to copy into the checkpoint.
    """
    request, manifest, incomplete = begin(directory, runner, manifest)
    request.execute_sync()
    if dist.get_rank() == 0:
        complete(incomplete, directory, manifest, tokenizer)
    dist.barrier()
    return directory


def begin(directory: Path, runner: ModelRunner, manifest: Manifest) -> tuple[AsyncRequest, Manifest, Path]:
    """What has to be done to write the weights, the manifest with `lora` filled in, and the temporary directory;
    collective over all ranks."""
    incomplete = on_rank0(lambda: start(directory))
    request = dist_checkpointing.save(
        _sharded_state(runner, manifest.optimizer, is_loading=False),
        str(incomplete / WEIGHTS),
        async_sharded_save=True,
    )
    return request, manifest.model_copy(update={"lora": lora.attached(runner.chunks)}), incomplete


def start(directory: Path) -> Path:
    """A temporary directory, with an empty one for weights, for what will be the checkpoint `directory`.

    No other has its name: writers that outlive a killed job for a moment cannot write into its successor's files.
    """
    incomplete = directory.parent / f".{directory.name}.{os.getpid()}-{time.time_ns()}{INCOMPLETE}"
    (incomplete / WEIGHTS).mkdir(parents=True)
    return incomplete


def mark_weights(weights: Path) -> None:
    """Write beside the arrays what Megatron's reader has to know: their format, and that there is no other state."""
    torch.save({}, weights / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(weights))


def complete(incomplete: Path, directory: Path, manifest: Manifest, tokenizer: Path | None) -> None:
    """Make a checkpoint of the weights that are written, on one rank: tokenizer, manifest with digests, final name."""
    if tokenizer is not None:
        copy_tokenizer(tokenizer, incomplete / TOKENIZER)
    _seal(incomplete, manifest)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(incomplete, directory)
    fsync(directory.parent)


def load(directory: Path, runner: ModelRunner, *, optimizer: bool = False, fresh_head: bool = False) -> Manifest:
    """Load weights, and the optimizer if asked for, under this job's layout; collective over all ranks.

    Training goes on with the adapters it was saved with, and with this job's settings of optimizer and schedule. Who
    reads the weights alone gets them with adapters merged.

    Args:
        fresh_head: leave the scalar head as it was initialised (a reward model that starts from a language model).

    Raises:
        ConfigError: see `read_manifest`; or the optimizer was asked for and not saved, or with other adapters or in
            another precision.
    """
    manifest = read_manifest(directory)
    if optimizer and not manifest.optimizer:
        raise ConfigError(f"{directory} holds no optimizer state: training cannot go on from it")
    if optimizer and manifest.lora != lora.attached(runner.chunks):
        raise ConfigError(
            f"{directory} was saved with model.lora = {manifest.lora}; training cannot go on from it with "
            f"{lora.attached(runner.chunks)}"
        )
    precision = "bf16" if runner.config.bf16 else "fp32"
    if optimizer and precision != (stored := stored_precision(directory)):
        raise ConfigError(
            f"{directory} was saved with model.precision = {stored}; training cannot go on from it with {precision}"
        )
    to_merge = None if optimizer else manifest.lora
    if to_merge is not None:
        lora.attach(runner.chunks, to_merge)
    state = _sharded_state(runner, optimizer, is_loading=True)
    if fresh_head:
        for name in [name for name in state if name.startswith("chunk")]:
            state[name] = {key: value for key, value in state[name].items() if not key.startswith("head.")}
    loaded = dist_checkpointing.load(state, str(directory / WEIGHTS))
    for index, chunk in enumerate(runner.chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"chunk{index}"], strict=False)
        wrong = [key for key in missing if not key.endswith("_extra_state") and not (fresh_head and "head." in key)]
        if wrong or unexpected:
            raise ConfigError(f"{directory} does not fit the model: missing {wrong}, unexpected {unexpected}")
    if to_merge is not None:
        lora.merge(runner.chunks)
    if optimizer:
        load_state(runner.optimizer, runner.scheduler, loaded["optimizer"], loaded["scheduler"])
    elif runner.optimizer is not None:
        runner.optimizer.reload_model_params()
    return manifest


def _sharded_state(runner: ModelRunner, optimizer: bool, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        f"chunk{index}": unwrap(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(runner.chunks)
    }
    if optimizer:
        state["optimizer"] = runner.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
        state["scheduler"] = runner.scheduler.state_dict()
    return state


def _seal(directory: Path, manifest: Manifest) -> None:
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    digests = _digests(directory, names)
    files = {name: FileEntry(size=(directory / name).stat().st_size, sha256=digests[name]) for name in names}
    (directory / MANIFEST).write_text(json.dumps(manifest.model_copy(update={"files": files}).model_dump(), indent=1))
    fsync_tree(directory)


def _digests(directory: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files, several at a time: hashing does not hold Python's lock."""

    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


@contextmanager
def removed_on_error(directory: Path) -> Iterator[None]:
    """Remove a directory that the block fails to fill, at Ctrl-C too: it may be as large as a model."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory)
        raise


def fsync_tree(directory: Path) -> None:
    """Wait until every file below `directory`, and their names, are on the disk."""
    for path in (*directory.rglob("*"), directory):
        fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
