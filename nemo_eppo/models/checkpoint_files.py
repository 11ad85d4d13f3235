"""The files of a checkpoint's directory, which is complete or does not exist.

It holds `weights/` (megatron-core's distributed format, which loads under any layout), `tokenizer/` and
`manifest.json`. It is written under a temporary name, flushed, and renamed. The manifest lists every file with its size
and digest, so that a truncated or altered file is named before anything is loaded.
"""

import base64
import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_eppo.config import Config, ConfigError, load_config
from nemo_eppo.files import (
    fsync_tree,
    inside,
    json_object,
    put_in_place,
    remove_directory,
    sha256,
    unused_name,
    write_atomically,
)
from nemo_eppo.models.stored_pickles import read_metadata
from nemo_eppo.settings.model import Head, LoRAConfig, ModelConfig, Precision

MANIFEST, WEIGHTS, TOKENIZER = "manifest.json", "weights", "tokenizer"
_FORMAT = 1
_NOTES = "digests_of_writer_"
GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    f"tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.model chat_template* {GENERATION}"
)


class FileEntry(Config):
    """One file of a checkpoint."""

    size: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the content, in hexadecimal digits."""


class Manifest(Config):
    """What a checkpoint holds: the model, the state of the run, and the digests of its files."""

    format: int = _FORMAT
    """Version of this format."""
    head: Head
    """lm for a policy, scalar for a critic or plain reward model, odin or inform for a reward model of that kind."""
    step: int = Field(ge=0)
    """Steps of the training loop when it was saved."""
    model: ModelConfig
    """The model's architecture."""
    lora: LoRAConfig | None = None
    """Adapters beside the model's own weights, filled in by `save`; null for none."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """The validation metrics at this step."""
    optimizer: bool = False
    """Whether it holds optimizer and schedule, so that training can resume from it."""
    state: dict[str, Any] = Field(default_factory=dict)
    """State of the loop, and constants of the model: a reward model's mean and std."""
    files: dict[str, FileEntry] = Field(default_factory=dict)
    """All other files, by path within the checkpoint."""


def read_manifest(directory: Path, head: Head | None = None) -> Manifest:
    """Read the manifest of a checkpoint whose files are all there and unaltered in size.

    Args:
        head: expect a language model (lm) or a model with any other head (scalar); None for either.

    Raises:
        ConfigError: no checkpoint, another kind of model than `head`, or a file (named) that is missing, truncated, or
            outside the checkpoint.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{directory} is not a checkpoint: it has no {MANIFEST}")
    try:
        manifest = load_config(Manifest, json_object(path.read_bytes()))
    except ValueError as error:  # NotAnObject or ConfigError
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if manifest.format != _FORMAT:
        raise ConfigError(f"{path}: format {manifest.format}, this version reads format {_FORMAT}")
    if head is not None and (manifest.head == "lm") != (head == "lm"):
        wanted = "an SFT model or a policy" if head == "lm" else "a reward model or a critic"
        raise ConfigError(f"{directory} holds a model with head '{manifest.head}', expected '{head}': {wanted}")
    for name, entry in manifest.files.items():
        file = inside(directory, name, path)
        if not file.is_file():
            raise ConfigError(f"{directory} is damaged: it has no {name}, which its manifest lists")
        if (found := file.stat().st_size) != entry.size:
            raise ConfigError(f"{directory} is damaged: {name} has {found} bytes, its manifest says {entry.size}")
    return manifest


def verify(directory: Path) -> Manifest:
    """Read the manifest as `read_manifest` does, and also compare the digest of every file."""
    manifest = read_manifest(directory)
    compare(directory, manifest, digests(directory, list(manifest.files)))
    return manifest


def compare(directory: Path, manifest: Manifest, found: Mapping[str, str]) -> None:
    """Raise ConfigError if the digests `found` for a checkpoint's files are not those of its manifest."""
    for name, entry in manifest.files.items():
        if found[name] != entry.sha256:
            raise ConfigError(f"{directory} is damaged: the content of {name} is not what its manifest says")


def latest(directory: Path) -> Path | None:
    """Find the newest complete checkpoint `step_*` in a directory of checkpoints."""
    saved = complete_in(directory)
    return saved[-1] if saved else None


def complete_in(directory: Path) -> list[Path]:
    """List the complete checkpoints `step_*` in a directory, oldest first."""
    found = (path for path in directory.glob("step_*") if (path / MANIFEST).is_file())
    return sorted(found, key=lambda path: (len(path.name), path.name))  # numbers of more than six digits, too


def find(path: Path, where: str) -> Path:
    """Find the checkpoint at `path`, or the newest in it; ConfigError, beginning with `where`, if there is none."""
    if not path.exists():
        raise ConfigError(f"{where}: {path} does not exist")
    if (path / MANIFEST).is_file():
        return path
    newest = latest(path)
    if newest is None:
        hint = ""
        if path.suffix == ".nemo" or (path / "model_config.yaml").is_file():
            hint = "; `nemo-eppo convert nemo-to-megatron` makes one of a model of NeMo"
        elif latest(path / "checkpoints") is not None:
            hint = f"; it is the directory of a run, whose checkpoints are in {path}/checkpoints"
        raise ConfigError(f"{where}: {path} is no checkpoint and holds none (step_*){hint}")
    return newest


def stored_precision(directory: Path) -> Precision:
    """Read the precision of the weights in a checkpoint."""
    name = "embedding.word_embeddings.weight"
    stored = read_metadata(directory / WEIGHTS).state_dict_metadata.get(name)
    if not isinstance(stored, TensorStorageMetadata):
        raise ConfigError(f"{directory / WEIGHTS} holds no tensor {name}: expected the weights of a model")
    return "bf16" if stored.properties.dtype == torch.bfloat16 else "fp32"


def model_identity(directory: Path) -> str:
    """Name the model in a directory by 64 hexadecimal digits; they change when the model is replaced in place.

    They are the digest of a checkpoint's manifest, which lists the digest of every file, or of the names, sizes and
    times of change of the files in another kind of model directory.
    """
    manifest = directory / MANIFEST
    if manifest.is_file():
        return sha256(manifest)
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(directory.iterdir()) if f.is_file()]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer files and generation settings, and no others, from a Hugging Face directory."""
    target.mkdir(exist_ok=True)
    for pattern in _TOKENIZER_FILES.split():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def start(directory: Path) -> Path:
    """Make the temporary directory, with an empty one for weights, of the future checkpoint `directory`."""
    incomplete = unused_name(directory)
    (incomplete / WEIGHTS).mkdir(parents=True)
    return incomplete


def complete(incomplete: Path, directory: Path, manifest: Manifest, tokenizer: Path | None) -> None:
    """Seal a checkpoint whose weights are written, on one rank, and give it its final name."""
    seal(incomplete, manifest, tokenizer)
    fsync_tree(incomplete)
    if directory.exists():
        remove_directory(directory)
    put_in_place(incomplete, directory)


def seal(directory: Path, manifest: Manifest, tokenizer: Path | None) -> None:
    """Add to a checkpoint's weights the tokenizer, and the manifest with every digest."""
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory / TOKENIZER)
    noted: dict[str, str] = {}
    for notes in directory.glob(f"{_NOTES}*"):
        noted |= json.loads(notes.read_bytes())
        notes.unlink()
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    noted |= digests(directory, [name for name in names if name not in noted])
    files = {name: FileEntry(size=(directory / name).stat().st_size, sha256=noted[name]) for name in names}
    (directory / MANIFEST).write_text(json.dumps(manifest.model_copy(update={"files": files}).model_dump(), indent=1))


def note_digests(directory: Path, names: list[str], writer: int) -> None:
    """Note the digests of files that process number `writer` has written; `seal` collects them, and adds missing
    ones."""
    write_atomically(directory / f"{_NOTES}{writer}", json.dumps(digests(directory, names)))


def digests(directory: Path, names: list[str]) -> dict[str, str]:
    """Compute the SHA-256 of files, several at a time: hashing does not hold Python's lock."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(sha256, (directory / name for name in names)), strict=True))


def pack_array(array: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Pack an fp32 array for a manifest's state, in base64, a seventh of the size of its numbers as text."""
    return {"shape": list(array.shape), "fp32": base64.b64encode(array.astype("<f4").tobytes()).decode()}


def unpack_array(packed: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Return the array that `pack_array` packed, as a writable copy."""
    numbers = np.frombuffer(base64.b64decode(packed["fp32"]), "<f4")
    return numbers.reshape(packed["shape"]).astype(np.float32)
