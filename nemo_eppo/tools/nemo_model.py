"""Reads the models of NeMo 1.x and NeMo-Aligner: a .nemo file, which is a tar archive, or the directory it unpacks to.

It holds model_config.yaml and model_weights/, a distributed checkpoint of megatron-core. Its arrays are named and
stacked over layers as in our checkpoints, but with the prefix "model." and another name of the head.
"""

import json
import posixpath
import tarfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron.checkpoint_weights import StoredArrays, stored_key
from nemo_eppo.models.checkpoint_files import Manifest
from nemo_eppo.models.hf_names import Shape, entries
from nemo_eppo.settings.model import Head, ModelConfig, Precision
from nemo_eppo.tools.aligner_config import read
from nemo_eppo.tools.nemo_config import nemo_model_config, nemo_reward_state

CONFIG, WEIGHTS, BACKEND = "model_config.yaml", "model_weights", "metadata.json"
_PREFIX = "model."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LISTED = 8  # most tensors that one error message lists


def unpack(source: Path, target: Path, *, descriptions_only: bool = False) -> Path:
    """Return the directory of a model: `source` itself, or `target`, into which a .nemo file is unpacked.

    Args:
        target: a directory that does not exist yet.
        descriptions_only: unpack the files that `NemoModel` checks, without the arrays.

    Raises:
        ConfigError: there is no such file or directory, or it is no archive, or one with paths outside of `target`.
    """
    if source.is_dir():
        return source
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                folder, _, file = name.partition("/")
                if name == CONFIG or (folder == WEIGHTS and (not descriptions_only or file in (".metadata", BACKEND))):
                    archive.extract(member, target, filter="data")
    except FileNotFoundError:
        raise ConfigError(f"--input: {source} does not exist") from None
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{source}: expected a directory or a .nemo file, which is a tar archive: {error}") from None
    target.mkdir(exist_ok=True)
    return target


class NemoModel:
    """A model whose settings and arrays are checked on creation; tensors are read on request.

    Args:
        directory: the result of `unpack`.
        name: the user's path of the model, for messages.

    Raises:
        ConfigError: files are missing or of another format, a setting is not supported, or arrays are missing, have
            another shape, or have no place in the model; the message lists them.
    """

    head: Head
    """lm, or scalar for a reward model or critic, which have a head."""
    model: ModelConfig
    precision: Precision
    """The narrowest precision that holds every array exactly: fp16 needs fp32. Heads do not count."""

    def __init__(self, directory: Path, name: Path) -> None:
        self.name = name
        _check_format(directory, name)
        try:
            self._stored = StoredArrays(directory / WEIGHTS)
            leaves = read(directory / CONFIG)
        except ConfigError as error:  # names the directory that a .nemo file was unpacked to
            raise ConfigError(str(error).replace(str(directory), str(name))) from None
        arrays = self._stored.arrays
        self.head = "scalar" if f"{_PREFIX}rm_head.weight" in arrays else "lm"
        embedding = arrays.get(f"{_PREFIX}embedding.word_embeddings.weight")
        rows = embedding.size[0] if embedding else 0
        try:
            self.model = nemo_model_config(leaves, rows, self.head)
            self._state = nemo_reward_state(leaves) if self.head == "scalar" else {}
            self._entries = entries(self.model, None if self.head == "lm" else 1)
        except (ConfigError, TypeError) as error:  # TypeError: a text where NeMo has a number
            raise ConfigError(f"{name}, {CONFIG}: {error}") from None
        self._check()
        dtypes = {array.properties.dtype for key, array in arrays.items() if _is_of_body(key)}
        self.precision = "bf16" if dtypes == {torch.bfloat16} else "fp32"
        self._places = {
            tensor: (parameter, index)
            for parameter, entry in self._entries.items()
            for index, tensor in enumerate(entry.tensors)
        }
        self._parameter = lru_cache(maxsize=1)(self._read)  # a parameter's tensors are read one after another

    def manifest(self) -> Manifest:
        """Return the manifest of a checkpoint of this model, with the statistics of a reward model's scores."""
        return Manifest(head=self.head, step=0, model=self.model, state=self._state)

    def tensor(self, name: str) -> Tensor:
        """Read the whole tensor of a Hugging Face name in its stored dtype; KeyError if there is none."""
        parameter, index = self._places[name]
        return self._parameter(parameter)[index]

    def _read(self, parameter: str) -> list[Tensor]:
        key, layer = _stored_key(parameter)
        return self._entries[parameter].join([self._stored.read(key, layer, self._shape(parameter))], self.model)

    def _shape(self, parameter: str) -> Shape:
        entry = self._entries[parameter]
        if entry.split == "vocabulary":  # without our padding
            return next(iter(entry.tensors.values()))
        return entry.shape(self.model)

    def _check(self) -> None:
        expected: dict[str, Shape] = {}
        for parameter in self._entries:
            (key, layer), shape = _stored_key(parameter), self._shape(parameter)
            expected[key] = shape if layer is None else (self.model.num_layers, *shape)
        problems = []
        for key, shape in expected.items():
            array = self._stored.arrays.get(key)
            if array is None:
                problems.append(f"{key}: expected {shape}, found no such array")
            elif tuple(array.size) != shape:
                problems.append(f"{key}: expected {shape}, found {tuple(array.size)}")
            elif array.properties.dtype not in _DTYPES:
                problems.append(f"{key}: stored as {array.properties.dtype}; expected fp32, bf16 or fp16")
        known = set(expected)
        if self.head == "scalar":
            known.add(f"{_PREFIX}output_layer.weight")  # of NeMo-Aligner's reward models, which do not use it
        problems += [
            f"{key}, which this model does not have"
            for key in (*self._stored.arrays, *self._stored.others)
            # arrays without the prefix are the optimizer's; extra states are TransformerEngine's, for fp8
            if key.startswith(_PREFIX) and key not in known and "_extra_state" not in key
        ]
        if problems:
            more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            lines = "".join(f"\n  - {problem}" for problem in problems[:_LISTED] + more)
            raise ConfigError(f"{self.name} does not hold the model that its {CONFIG} describes:{lines}")


def _stored_key(parameter: str) -> tuple[str, int | None]:
    """Return a parameter's name in NeMo's checkpoint, and its layer (from 0); None for no layer."""
    key, layer = stored_key(parameter)
    return _PREFIX + (f"rm_{key}" if key.startswith("head.") else key), layer


def _is_of_body(key: str) -> bool:
    return key.startswith(_PREFIX) and not key.startswith(f"{_PREFIX}rm_head.")


def _check_format(directory: Path, name: Path) -> None:
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{name} has no {CONFIG}: expected a model of NeMo 1.x or NeMo-Aligner")
    if not (directory / WEIGHTS).is_dir():
        raise ConfigError(
            f"{name} has no {WEIGHTS}/, one of Megatron-core's distributed checkpoints: convert older formats with "
            "NeMo's scripts/checkpoint_converters/convert_gpt_nemo_to_mcore.py; a file of adapters has no model"
        )
    try:
        backend = json.loads((directory / WEIGHTS / BACKEND).read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: {WEIGHTS}/{BACKEND} cannot be read: {error}") from None
    if backend != "torch_dist":
        raise ConfigError(
            f"{name}: the weights are stored as {backend!r}: expected 'torch_dist'. Restore the model in NeMo 2.0 or "
            "NeMo-Aligner with model.dist_ckpt_format=torch_dist and save it again; of a training's language model "
            "NeMo's scripts/checkpoint_converters/convert_zarr_to_torch_dist.py --save_to_nemo does so"
        )
