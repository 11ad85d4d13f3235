"""Which Hugging Face tensors each Megatron parameter holds, and how it is split over tensor-parallel ranks.

`linear_qkv` interleaves query, key and value rows by attention group, `linear_fc1` stacks gate and up rows, and each is
split over tensor-parallel ranks. What the tensors are called, and whether the parts of these two are tensors of their
own, is the family's to say.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nemo_eppo.models.families import family_of
from nemo_eppo.models.model_config import ModelConfig

Shape = tuple[int, ...]
_Split = Literal["whole", "vocabulary", "columns", "gate_up", "qkv"]


class Entry(NamedTuple):
    """How one Megatron parameter is split over ranks, and the Hugging Face tensors it holds."""

    split: _Split
    tensors: dict[str, Shape]
    rows: tuple[int, ...]
    """Rows of each part that a parameter joins (query, key, value; gate, up), be they tensors or parts of one."""

    def shard(self, whole: list[Tensor], model: ModelConfig, rank: int = 0, size: int = 1) -> Tensor:
        """Whole Hugging Face tensors -> the parameter on one of `size` tensor-parallel ranks."""
        parts = whole if len(whole) == len(self.rows) else list(whole[0].split(self.rows))
        return _shard(self.split, parts, model, rank, size)

    def join(self, shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """The parameter on all tensor-parallel ranks -> whole Hugging Face tensors that share no memory with it."""
        parts = _join(self.split, shards, model)
        return parts if len(parts) == len(self.tensors) else [torch.cat(parts)]

    def shape(self, model: ModelConfig) -> Shape:
        """Shape of the parameter in an unsplit model."""
        return tuple(self.shard([torch.empty(shape, device="meta") for shape in self.tensors.values()], model).shape)


def hf_names(model: ModelConfig) -> list[tuple[str, Shape]]:
    """Name and shape of every tensor of the language model, in the order in which `export_tensors` gives them."""
    return [tensor for entry in entries(model).values() for tensor in entry.tensors.items()]


def entries(model: ModelConfig, outputs: int | None = None) -> dict[str, Entry]:
    """All parameters by name, layers numbered over the whole model; `outputs` of a scalar head, None for lm_head."""
    hidden, ffn, width = model.hidden_size, model.ffn_hidden_size, model.head_width
    query, kv = model.num_attention_heads * width, model.kv_heads * width
    names = family_of(model).names

    def entry(name: str, split: _Split, *parts: Shape, prefix: str = "") -> Entry:
        rows = tuple(part[0] for part in parts)
        shapes = parts if len(names[name]) == len(parts) else ((sum(rows), *parts[0][1:]),)
        return Entry(split, {prefix + tensor: shape for tensor, shape in zip(names[name], shapes, strict=True)}, rows)

    layer: dict[str, tuple[_Split, *tuple[Shape, ...]]] = {
        "input_layernorm.weight": ("whole", (hidden,)),
        "self_attention.linear_qkv.weight": ("qkv", (query, hidden), (kv, hidden), (kv, hidden)),
        "self_attention.linear_proj.weight": ("columns", (hidden, query)),
        "pre_mlp_layernorm.weight": ("whole", (hidden,)),
        "mlp.linear_fc1.weight": ("gate_up", (ffn, hidden), (ffn, hidden)),
        "mlp.linear_fc2.weight": ("columns", (hidden, ffn)),
    }
    if model.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = ("qkv", (query,), (kv,), (kv,))
    if model.qk_norm:
        layer["self_attention.q_layernorm.weight"] = ("whole", (width,))
        layer["self_attention.k_layernorm.weight"] = ("whole", (width,))
    if model.post_norms:
        layer["self_attn_bda.norm.weight"] = layer["mlp_bda.norm.weight"] = ("whole", (hidden,))

    embedding, projection = "embedding.word_embeddings.weight", "output_layer.weight"
    found = {embedding: entry(embedding, "vocabulary", (model.vocab_size, hidden))}
    for i in range(model.num_layers):
        for name, (split, *parts) in layer.items():
            found[f"decoder.layers.{i}.{name}"] = entry(name, split, *parts, prefix=f"model.layers.{i}.")
    found["decoder.final_layernorm.weight"] = entry("decoder.final_layernorm.weight", "whole", (hidden,))
    if outputs is not None:
        found["head.weight"] = Entry("whole", {"score.weight": (outputs, hidden)}, (outputs,))
        found["head.bias"] = Entry("whole", {"score.bias": (outputs,)}, (outputs,))
    elif not model.tie_embeddings:
        found[projection] = entry(projection, "vocabulary", (model.vocab_size, hidden))
    return found


def _join(split: _Split, shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
    """Shards of all tensor-parallel ranks -> whole tensors, contiguous, sharing no memory with the shards."""
    if split == "whole":
        return [shards[0].clone()]
    if split == "vocabulary":
        return [torch.cat(shards)[: model.vocab_size]]
    if split == "columns":
        return [torch.cat(shards, dim=1)]
    if split == "gate_up":
        return list(torch.cat([shard.unflatten(0, (2, -1)) for shard in shards], dim=1).unbind())
    rows = torch.cat(shards).unflatten(0, (model.kv_heads, -1, model.head_width))  # per group: its queries, key, value
    return [part.flatten(0, 2).contiguous() for part in (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])]


def _shard(split: _Split, whole: list[Tensor], model: ModelConfig, rank: int, size: int) -> Tensor:
    """Whole tensors -> the shard of one of `size` tensor-parallel ranks; the inverse of `_join`."""
    if split == "whole":
        return whole[0]
    if split == "vocabulary":
        padding = model.padded_vocab_size(size) - model.vocab_size
        return nn.functional.pad(whole[0], (0, 0, 0, padding)).chunk(size)[rank]
    if split == "columns":
        return whole[0].chunk(size, dim=1)[rank]
    parts = [tensor.chunk(size)[rank] for tensor in whole]
    if split == "gate_up":
        return torch.cat(parts)
    groups = [part.unflatten(0, (model.kv_heads // size, -1, model.head_width)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)
