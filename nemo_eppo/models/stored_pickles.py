"""Reads the pickled parts of a checkpoint's weights. A pickle can run code, so all but plain data is refused.

torch.distributed.checkpoint and megatron-core pickle metadata and every entry that is not a tensor, and unpickle them
without a check. They are checked here first.
"""

import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_eppo.config import ConfigError
from nemo_eppo.files import inside

_METADATA, _COMMON = ".metadata", "common.pt"  # names of torch and of megatron-core
_CHECKPOINT = "torch.distributed.checkpoint"
# The classes that torch 2.13 and megatron-core 0.16 write into metadata, besides dtypes, and older ones' places of
# them. Making one has no effect: data classes, enumerations, and the look-up of a layout by its name.
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "pathlib": {"PosixPath"},
}


def read_metadata(weights: Path) -> Metadata:
    """Read the metadata of a directory of weights: names, shapes and places of its entries.

    Raises:
        ConfigError: the file is missing or damaged, holds a class that has no business there (named), or names files
            outside `weights`.
    """
    path = weights / _METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file, path).load()
        files = {place.relative_path for place in metadata.storage_data.values()}
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ConfigError(f"{path} cannot be read: {error}") from None
    for name in files:
        inside(weights, name, path)
    return metadata


def refuse_code(weights: Path) -> None:
    """Raise ConfigError if anything in a directory of weights could run code while megatron-core loads it.

    Tensors are not read here: torch never loads them as anything else. See `refusals` for what it finds in them.
    """
    metadata = read_metadata(weights)
    with (weights / _COMMON).open("rb") as file:
        _refuse_code(file, str(weights / _COMMON))
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            continue
        where = f"{weights / place.relative_path}, entry {index.fqn}"
        if place.transform_descriptors:
            raise ConfigError(
                f"{where}: expected an entry that is not transformed, found {place.transform_descriptors}"
            )
        with (weights / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            _refuse_code(io.BytesIO(file.read(place.length)), where)


@contextmanager
def refusals(where: object) -> Iterator[None]:
    """Turn torch's refusal of a class into a ConfigError that names the class, and `where` it was found."""
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refused(where, named[1]) from None
        raise


def _refuse_code(file: BinaryIO, where: str) -> None:
    try:
        with refusals(where):
            torch.load(file, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"{where} cannot be read: {error}") from None


def _refused(where: object, name: str) -> ConfigError:
    return ConfigError(f"{where} was refused, and nothing in it was run: it holds {name}, which is no part of weights")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _CLASSES.get(module, ()):
            raise _refused(self._path, f"{module}.{name}")
        return super().find_class(module, name)
