"""Which Hugging Face tensors each Megatron parameter holds, and how it is split over tensor-parallel ranks.

`linear_qkv` interleaves query, key and value rows by attention group, and `linear_fc1` stacks gate and up rows. The
family says how tensors are called, and whether the parts of these two are separate tensors.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nemo_eppo.models.families import family_of
from nemo_eppo.settings.model import ModelConfig

Shape = tuple[int, ...]
_Split = Literal["whole", "vocabulary", "columns", "gate_up", "qkv"]


class Entry(NamedTuple):
    """How one Megatron parameter is split over ranks, and the Hugging Face tensors it holds."""

    split: _Split
    """How the parameter is split; "whole" is the same on every rank."""
    tensors: dict[str, Shape]
    """Names and shapes of the tensors."""
    rows: tuple[int, ...]
    """Rows of each part of the parameter (query, key, value; gate, up), each a tensor or part of one."""

    def shard(self, whole: list[Tensor], model: ModelConfig, rank: int = 0, size: int = 1) -> Tensor:
        """Whole Hugging Face tensors -> the parameter on one of `size` tensor-parallel ranks; undone by `join`."""
        if self.split == "whole":
            return whole[0]
        if self.split == "vocabulary":
            padding = model.padded_vocab_size(size) - model.vocab_size
            return nn.functional.pad(whole[0], (0, 0, 0, padding)).chunk(size)[rank]
        if self.split == "columns":
            return whole[0].chunk(size, dim=1)[rank]
        parts = whole if len(whole) == len(self.rows) else whole[0].split(self.rows)
        parts = [part.chunk(size)[rank] for part in parts]
        if self.split == "gate_up":
            return torch.cat(parts)
        groups = [part.unflatten(0, (model.kv_heads // size, -1, model.head_width)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 2)

    def join(self, shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """The parameter on all tensor-parallel ranks -> whole Hugging Face tensors that share no memory with it."""
        if self.split == "whole":
            return [shards[0].clone()]
        if self.split == "vocabulary":
            return [torch.cat(shards)[: model.vocab_size]]
        if self.split == "columns":
            return [torch.cat(shards, dim=1)]
        if self.split == "gate_up":
            parts = list(torch.cat([shard.unflatten(0, (2, -1)) for shard in shards], dim=1).unbind())
        else:  # for each group: its queries, key, value
            rows = torch.cat(shards).unflatten(0, (model.kv_heads, -1, model.head_width))
            parts = [part.flatten(0, 2).contiguous() for part in (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])]
        return parts if len(parts) == len(self.tensors) else [torch.cat(parts)]

    def shape(self, model: ModelConfig) -> Shape:
        """Return the parameter's shape in an unsplit model."""
        return tuple(self.shard([torch.empty(shape, device="meta") for shape in self.tensors.values()], model).shape)


def hf_names(model: ModelConfig) -> list[tuple[str, Shape]]:
    """List name and shape of every tensor of the language model, in the order of `export_tensors`."""
    return [tensor for entry in entries(model).values() for tensor in entry.tensors.items()]


def entries(model: ModelConfig, outputs: int | None = None) -> dict[str, Entry]:
    """Describe all parameters by name, with layers numbered over the whole model.

    Args:
        outputs: numbers per token of a scalar head; None for a language model.
    """
    hidden, ffn, width = model.hidden_size, model.ffn_hidden_size, model.head_width
    query, kv = model.num_attention_heads * width, model.kv_heads * width
    family = family_of(model)
    names = family.names

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
    described = {embedding: entry(embedding, "vocabulary", (model.vocab_size, hidden))}
    for i in range(model.num_layers):
        for name, (split, *parts) in layer.items():
            described[f"decoder.layers.{i}.{name}"] = entry(name, split, *parts, prefix=f"{family.layer_prefix}{i}.")
    described["decoder.final_layernorm.weight"] = entry("decoder.final_layernorm.weight", "whole", (hidden,))
    if outputs is not None:
        described["head.weight"] = Entry("whole", {"score.weight": (outputs, hidden)}, (outputs,))
        described["head.bias"] = Entry("whole", {"score.bias": (outputs,)}, (outputs,))
    elif not model.tie_embeddings:
        described[projection] = entry(projection, "vocabulary", (model.vocab_size, hidden))
    return described
