"""Reads and fills a running model's weights as whole tensors under their Hugging Face names, in any layout."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import device, lora
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.specs import FUSED_NORMS
from nemo_eppo.models.hf_names import Shape, entries
from nemo_eppo.settings.model import ModelConfig


def export_tensors(chunks: list[Any], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield a copy of every whole tensor under its Hugging Face name, the same on all ranks of a replica.

    Collective: all ranks iterate to the end. A model with a scalar head gives `score.weight` and `score.bias` in place
    of `lm_head.weight`. Adapters are merged into the copies; the model keeps them apart.
    """
    mine = _parameters(chunks)
    adapters = {id(adapter.weight): adapter for adapter in lora.adapters(chunks)}
    tensor_ranks, stages = unwrap(chunks[0]).tp_group, unwrap(chunks[0]).pp_group
    held: list[dict[str, tuple[Shape, torch.dtype]]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(held, {name: (tuple(p.shape), p.dtype) for name, p in mine.items()}, group=stages)
    layouts = {name: layout for stage in held for name, layout in stage.items()}
    outputs = layouts["head.weight"][0][0] if "head.weight" in layouts else None
    for name, entry in entries(model, outputs).items():
        owner = next(rank for rank, names in enumerate(held) if name in names)
        if owner == stages.rank():
            adapter = adapters.get(id(mine[name]))
            parameter = (adapter.merged_weight() if adapter else mine[name].detach()).contiguous()
            shards = [torch.empty_like(parameter) for _ in range(tensor_ranks.size())]
            dist.all_gather(shards, parameter, group=tensor_ranks)
            tensors = entry.join(shards, model)
        else:
            dtype = layouts[name][1]
            tensors = [torch.empty(shape, dtype=dtype, device=device.device()) for shape in entry.tensors.values()]
        for hf_name, tensor in zip(entry.tensors, tensors, strict=True):
            if stages.size() > 1:
                dist.broadcast(tensor, dist.get_global_rank(stages, owner), group=stages)
            yield hf_name, tensor


@torch.no_grad()
def load_tensors(
    chunks: list[Any], model: ModelConfig, source: Callable[[str], Tensor], *, fresh_head: bool = False
) -> None:
    """Fill this rank's parameters from whole Hugging Face tensors, before an optimizer is built over them.

    Args:
        source: returns the tensor of a name, KeyError if there is none; called only for what this rank's stage holds.
        fresh_head: leave a scalar head as it was initialised, because a language model's checkpoint has none.

    Raises:
        ConfigError: tensors are missing or have the wrong shape, all of them listed; the others have been loaded.
    """
    group = unwrap(chunks[0]).tp_group
    mine = _parameters(chunks)
    outputs = mine["head.weight"].size(0) if "head.weight" in mine else None
    held = entries(model, outputs)
    if model.tie_embeddings:  # the last pipeline stage has its own copy
        held["output_layer.weight"] = held["embedding.word_embeddings.weight"]
    problems: list[str] = []
    for name, parameter in mine.items():
        if fresh_head and name.startswith("head."):
            continue
        whole = []
        for hf_name, shape in held[name].tensors.items():
            try:
                tensor = source(hf_name)
            except KeyError:
                problems.append(f"{hf_name}: expected {shape}, found no such tensor")
                continue
            if tensor.shape == shape:
                whole.append(tensor)
            else:
                problems.append(f"{hf_name}: expected {shape}, found {tuple(tensor.shape)}")
        if len(whole) == len(held[name].tensors):
            parameter.copy_(held[name].shard(whole, model, group.rank(), group.size()))
    if problems:
        raise ConfigError("checkpoint does not fit the model:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _parameters(chunks: list[Any]) -> dict[str, nn.Parameter]:
    """Return this rank's parameters without adapters, under the names of `entries` for every stage and layer spec."""
    parameters = {}
    for chunk in chunks:
        decoder = unwrap(chunk)
        for name, parameter in decoder.named_parameters():
            if f"{lora.SUFFIX}." in name:
                continue
            if name.startswith("decoder.layers."):
                index, rest = name.removeprefix("decoder.layers.").split(".", 1)
                number = decoder.decoder.layers[int(index)].layer_number - 1
                name = f"decoder.layers.{number}.{FUSED_NORMS.get(rest, rest)}"
            parameters[name] = parameter
    return parameters
