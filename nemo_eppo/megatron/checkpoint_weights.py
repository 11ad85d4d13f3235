"""Reads and writes the weights of a checkpoint one tensor at a time, without building the model or starting any ranks.

Megatron's distributed checkpoints are torch's: named arrays in pieces, any part of which can be read. Arrays of decoder
layers are stacked over all layers, and norms have the names of TransformerEngine's modules (see FUSED_NORMS).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron.specs import FUSED_NORMS
from nemo_eppo.models.hf_names import Entry, Shape, entries
from nemo_eppo.models.stored_pickles import read_metadata, refusals
from nemo_eppo.settings.model import ModelConfig

_NORMS = {name: fused for fused, name in FUSED_NORMS.items()}


def write_weights(
    directory: Path, model: ModelConfig, outputs: int | None, dtype: torch.dtype, source: Callable[[str], Tensor]
) -> None:
    """Write the weights of a checkpoint into an existing directory, holding at most one layer in memory.

    Args:
        outputs: numbers per token of a scalar head, which is stored in fp32; None for a language model.
        source: returns the whole Hugging Face tensor of a name.
    """
    layers: dict[int, list[WriteItem]] = {}
    makers: dict[MetadataIndex, Callable[[], Tensor]] = {}
    for name, entry in entries(model, outputs).items():
        (key, layer), shape = stored_key(name), entry.shape(model)
        stored = torch.float32 if name.startswith("head.") else dtype
        part = _part(layer, shape)
        stacked = shape if layer is None else (model.num_layers, *shape)
        index = MetadataIndex(key, part.offsets)
        data = TensorWriteData(part, TensorProperties(dtype=stored), torch.Size(stacked))

        def make(entry: Entry = entry, stored: torch.dtype = stored, sizes: Shape = part.sizes) -> Tensor:
            whole = [source(tensor).to(stored) for tensor in entry.tensors]
            return entry.shard(whole, model).reshape(sizes).contiguous()

        makers[index] = make
        layers.setdefault(-1 if layer is None else layer, []).append(
            WriteItem(index, WriteItemType.SHARD, tensor_data=data)
        )
    plans, metadata = create_default_global_save_plan([SavePlan(items) for items in layers.values()])
    writer = FileSystemWriter(directory, sync_files=False)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, _Makers(makers)).wait() for plan in plans])
    # Megatron's reader expects, beside the arrays, other state (none here) and the arrays' format
    torch.save({}, directory / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def read_weights(
    directory: Path, model: ModelConfig, outputs: int | None, adapters: float | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every whole tensor in its stored dtype under its Hugging Face name, holding one Megatron tensor at a time.

    Args:
        outputs: numbers per token of a scalar head; None for a language model.
        adapters: factor alpha / rank of the LoRA adapters to merge; None where there are none.

    Raises:
        ConfigError: the checkpoint lacks arrays that the model needs, all of which are listed; or see `read_metadata`.
    """
    stored = StoredArrays(directory)
    wanted = entries(model, outputs)
    if missing := sorted({stored_key(name)[0] for name in wanted} - stored.arrays.keys()):
        raise ConfigError(f"{directory} lacks {', '.join(missing)}")
    for name, entry in wanted.items():
        (key, layer), shape = stored_key(name), entry.shape(model)
        tensor = stored.read(key, layer, shape)
        adapter = key.removesuffix(".weight") + "_lora"
        if adapters is not None and f"{adapter}.a" in stored.arrays:
            rank = stored.arrays[f"{adapter}.a"].size[-2]
            low = (
                stored.read(f"{adapter}.b", layer, (shape[0], rank)).float()
                @ stored.read(f"{adapter}.a", layer, (rank, shape[1])).float()
            )
            tensor = (tensor.float() + adapters * low).to(tensor.dtype)
        yield from zip(entry.tensors, entry.join([tensor], model), strict=True)


class StoredArrays:
    """The arrays in a directory of weights, of which any part can be read.

    Raises:
        ConfigError: see `read_metadata`.
    """

    arrays: dict[str, TensorStorageMetadata]
    """Shape, dtype and pieces of every array, by its stored name."""
    others: list[str]
    """Names of the other entries."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._reader = directory, FileSystemReader(directory)
        metadata = read_metadata(directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        self.arrays = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.others = [key for key, _ in entries if key not in self.arrays]

    def read(self, key: str, layer: int | None, shape: Shape) -> Tensor:
        """Read an array, or one layer's part of an array that is stacked over layers, in its stored dtype.

        Args:
            shape: shape of the result, without the axis of layers.
        """
        stored, part = self.arrays[key], _part(layer, shape)
        target = torch.empty(part.sizes, dtype=stored.properties.dtype)
        plan = LoadPlan(create_read_items_for_chunk_list(key, stored, [part]))
        with refusals(self._directory):
            self._reader.read_data(plan, _Target(target)).wait()
        return target.reshape(shape)


class _Makers(DefaultSavePlanner):
    """Makes each tensor at the moment it is written."""

    def __init__(self, makers: dict[MetadataIndex, Callable[[], Tensor]]) -> None:
        super().__init__()
        self._makers = makers

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._makers[MetadataIndex(write_item.index.fqn, write_item.index.offset)]()


class _Target(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


def stored_key(name: str) -> tuple[str, int | None]:
    """Return a Megatron parameter's name in the checkpoint and its layer (from 0); None for a parameter of no layer."""
    if not name.startswith("decoder.layers."):
        return name, None
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{_NORMS.get(rest, rest)}", int(number)


def _part(layer: int | None, shape: Shape) -> ChunkStorageMetadata:
    """Locate an array of this shape in a stored one: the whole array, or one layer of a stack."""
    offsets, sizes = (0,) * len(shape), shape
    if layer is not None:
        offsets, sizes = (layer, *offsets), (1, *shape)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
