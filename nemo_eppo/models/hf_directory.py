"""Reads and writes Hugging Face model directories: config.json, tokenizer, and safetensors shards tensor by tensor."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_eppo.config import Config, ConfigError, load_config
from nemo_eppo.files import directory_made_whole, inside, write_json
from nemo_eppo.models import checkpoint_files
from nemo_eppo.models.families import family_of
from nemo_eppo.models.hf_config import model_config_from_hf
from nemo_eppo.models.hf_names import Shape, entries
from nemo_eppo.settings.model import Head, Precision

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
REWARD_KEY = "nemo_eppo_reward"
"""Key of config.json that holds a reward model's RewardStatistics; transformers keeps it and ignores it."""
_DTYPES = ("F32", "BF16", "F16")
_LISTED = 8  # tensors, at most, that one error message lists


class RewardStatistics(Config):
    """How a reward model's scores are standardised, (score - mean) / std."""

    score: Literal["last"] = "last"
    """The token at which a response is scored; sequence-classification models do so at the last."""
    mean: float
    """Mean of the scores on validation data; 0 for raw scores."""
    std: float = Field(gt=0)
    """Standard deviation of the scores on validation data; 1 for raw scores."""


class _Stored(NamedTuple):
    file: Path
    shape: Shape
    dtype: str


class HfDirectory:
    """A model directory whose settings, files and tensor shapes are checked on creation; tensors are read on request.

    Raises:
        ConfigError: an unsupported architecture or setting, missing or damaged files, and every tensor that is missing,
            has another shape, or has no place in the model.
    """

    head: Head
    """lm for *ForCausalLM, scalar for *ForSequenceClassification."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / CONFIG)
        names = self.config.get("architectures")
        if not isinstance(names or [], list) or not all(isinstance(name, str) for name in names or ()):
            raise ConfigError(f"{path / CONFIG}: architectures = {names!r}: expected a list of one name")
        try:
            self.model = model_config_from_hf(self.config)
        except ConfigError as error:
            raise ConfigError(f"{path / CONFIG}: {error}") from None
        self.architecture: str = self.config["architectures"][0]
        self.head = "lm" if self.architecture.endswith("ForCausalLM") else "scalar"
        self._stored = _headers(path)
        self._check()
        self._open: tuple[Path, Any] | None = None

    @staticmethod
    def at(path: Path) -> bool:
        """Tell whether `path` is such a directory, and not one of our checkpoints."""
        return (path / CONFIG).is_file() and not (path / checkpoint_files.MANIFEST).is_file()

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor in its stored dtype, on the CPU; KeyError if there is none. Keeps one file open.

        Of a scalar head that has no `score.bias`, it is zero.
        """
        if self.head == "scalar" and name == "score.bias" and name not in self._stored:
            return torch.zeros(1)
        file = self._stored[name].file
        if self._open is None or self._open[0] != file:
            self._open = (file, safe_open(file, framework="pt"))
        return self._open[1].get_tensor(name)

    @property
    def precision(self) -> Precision:
        """The narrowest precision that holds every tensor exactly: fp16 needs fp32. Scalar heads do not count."""
        narrow = all(found.dtype == "BF16" for name, found in self._stored.items() if not name.startswith("score."))
        return "bf16" if narrow else "fp32"

    def manifest(self) -> checkpoint_files.Manifest:
        """Return what a checkpoint of this model would record, with RewardStatistics if config.json has them."""
        state = {}
        if self.head == "scalar" and REWARD_KEY in self.config:
            state = load_config(RewardStatistics, self.config[REWARD_KEY]).model_dump()
        return checkpoint_files.Manifest(head=self.head, step=0, model=self.model, state=state)

    def _check(self) -> None:
        parameters = entries(self.model, None if self.head == "lm" else 1)
        expected = {name: shape for entry in parameters.values() for name, shape in entry.tensors.items()}
        optional: set[str] = set()
        if self.head == "scalar":
            del expected["score.bias"]
            optional = {"score.bias"}
        elif self.model.tie_embeddings:
            optional = set(family_of(self.model).names["output_layer.weight"])  # a copy of the embedding
        problems = []
        for name, shape in expected.items():
            found = self._stored.get(name)
            if found is None:
                problems.append(f"{name}: expected {shape}, found no such tensor")
            elif found.shape != shape:
                problems.append(f"{name}: expected {shape}, found {found.shape}")
        for name, found in self._stored.items():
            if name not in expected and name not in optional and not name.endswith("rotary_emb.inv_freq"):
                problems.append(f"{name}: {found.shape}, which {self.architecture} does not have")
            elif found.dtype not in _DTYPES:
                problems.append(f"{name}: stored as {found.dtype}; expected one of {', '.join(_DTYPES)}")
        if problems:
            more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            lines = "".join(f"\n  - {problem}" for problem in problems[:_LISTED] + more)
            raise ConfigError(f"{self.path} does not hold the {self.architecture} that its {CONFIG} describes:{lines}")


def write_hf_directory(
    path: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], tokenizer: Path, max_shard_bytes: int
) -> None:
    """Write a model directory that is complete or does not exist.

    Args:
        path: a directory that does not exist yet, or is empty.
        config: content of config.json, written last, so that `tensors` may still complete it.
        tensors: whole tensors by name; the tensors of one file are held in memory.
        tokenizer: directory whose tokenizer files are copied.
        max_shard_bytes: largest size of a safetensors file, except that a larger tensor gets one of its own.
    """
    with directory_made_whole(path) as incomplete:
        shards = _Shards(incomplete, max_shard_bytes)
        for name, tensor in tensors:
            shards.add(name, tensor.cpu())
        shards.finish()
        checkpoint_files.copy_tokenizer(tokenizer, incomplete)
        _add_eos(incomplete / checkpoint_files.GENERATION, config)
        write_json(incomplete / CONFIG, config)


def _add_eos(generation: Path, config: dict[str, Any]) -> None:
    """Add the tokenizer's EOS to the tokens that end a response in generation_config.json, if there is such a file."""
    if not generation.is_file():
        return
    settings = _read_json(generation)
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if config["eos_token_id"] not in ends:
        write_json(generation, settings | {"eos_token_id": [config["eos_token_id"], *ends]})


class _Shards:
    """Writes each safetensors file when it is full, and names all of them once their number is known."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._held[name] = tensor
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def _write(self) -> None:
        save_file(self._held, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._held))
        self._held, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}"

    def finish(self) -> None:
        self._write()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._directory / WEIGHTS)
            return
        weight_map = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        write_json(self._directory / INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map})


def _headers(path: Path) -> dict[str, _Stored]:
    """Read the headers of all files: every tensor's file, shape and dtype, by name."""
    if (path / INDEX).is_file():
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigError(f"{path / INDEX}: expected a weight_map of file names")
        names = sorted(set(weight_map.values()))
    else:
        names = [WEIGHTS]
    blobs = path.resolve().parent.parent / "blobs"  # in the hub's cache, which a snapshot's files link to
    files = [inside(path, name, path / INDEX, blobs) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        pickled = any(path.glob("pytorch_model*.bin"))
        hint = "; it has pickled weights: load it with transformers and save_pretrained() it" if pickled else ""
        raise ConfigError(
            f"{path} lacks {', '.join(missing)} (expected {WEIGHTS}, or {INDEX} and the files it lists){hint}"
        )
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    header = tensors.get_slice(name)
                    stored[name] = _Stored(file, tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ConfigError(f"{file} is damaged or no safetensors file: {error}") from None
    return stored


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
