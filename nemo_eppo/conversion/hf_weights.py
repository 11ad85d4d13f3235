"""Weights and settings of the Llama family between Hugging Face and Megatron, in every layout.

A Megatron parameter holds one or more Hugging Face tensors: `linear_qkv` interleaves query, key and value rows by
attention group, `linear_fc1` stacks gate and up rows, and each is split over tensor-parallel ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.megatron import device, lora
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.model_config import ModelConfig

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Supported architectures are these with `ForCausalLM` or `ForSequenceClassification` behind."""

Shape = tuple[int, ...]
_Split = Literal["whole", "vocabulary", "columns", "gate_up", "qkv"]

# TransformerEngine fuses a norm into the projection that follows it
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class UnsupportedArchitecture(ConfigError):
    """A model of none of the families."""


class Entry(NamedTuple):
    """How one Megatron parameter is split over ranks, and the Hugging Face tensors it holds."""

    split: _Split
    tensors: dict[str, Shape]

    def shard(self, whole: list[Tensor], model: ModelConfig, rank: int = 0, size: int = 1) -> Tensor:
        """Whole Hugging Face tensors -> the parameter on one of `size` tensor-parallel ranks."""
        return _shard(self.split, whole, model, rank, size)

    def join(self, shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """The parameter on all tensor-parallel ranks -> whole Hugging Face tensors that share no memory with it."""
        return _join(self.split, shards, model)

    def shape(self, model: ModelConfig) -> Shape:
        """Of the parameter in an unsplit model."""
        return tuple(self.shard([torch.empty(shape, device="meta") for shape in self.tensors.values()], model).shape)


def hf_names(model: ModelConfig) -> list[tuple[str, Shape]]:
    """Name and shape of every tensor of the language model, in the order in which `export_tensors` gives them."""
    return [tensor for entry in entries(model).values() for tensor in entry.tensors.items()]


def export_tensors(chunks: list[Any], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, whole, one at a time: a copy, the same on all ranks of a replica.

    Collective: all ranks iterate, to the end. A model with a scalar head gives `score.weight` and `score.bias` in place
    of `lm_head.weight`. Adapters are merged into the tensors, and not into the model.
    """
    mine = _parameters(chunks)
    adapters = {id(adapter.weight): adapter for adapter in lora.adapters(chunks)}
    tensor_ranks, stages = unwrap(chunks[0]).tp_group, unwrap(chunks[0]).pp_group
    held: list[dict[str, tuple[Shape, torch.dtype]]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(held, {name: (tuple(p.shape), p.dtype) for name, p in mine.items()}, group=stages)
    everywhere = {name: found for stage in held for name, found in stage.items()}
    outputs = everywhere["head.weight"][0][0] if "head.weight" in everywhere else None
    for name, entry in entries(model, outputs).items():
        owner = next(rank for rank, names in enumerate(held) if name in names)
        if owner == stages.rank():
            adapter = adapters.get(id(mine[name]))
            parameter = (adapter.merged_weight() if adapter else mine[name].detach()).contiguous()
            shards = [torch.empty_like(parameter) for _ in range(tensor_ranks.size())]
            dist.all_gather(shards, parameter, group=tensor_ranks)
            tensors = entry.join(shards, model)
        else:
            dtype = everywhere[name][1]
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
        source: gives the tensor of a name, KeyError if there is none; asked only for what this rank's stage holds. A
            missing `score.bias` means zero.
        fresh_head: leave a scalar head as it was initialised, for a checkpoint of a language model, which has none.

    Raises:
        ConfigError: tensors are missing or have the wrong shape, all of them listed; what was right has been loaded.
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
                if hf_name != "score.bias":
                    problems.append(f"{hf_name}: expected {shape}, found no such tensor")
                    continue
                tensor = torch.zeros(shape)
            if tensor.shape == shape:
                whole.append(tensor)
            else:
                problems.append(f"{hf_name}: expected {shape}, found {tuple(tensor.shape)}")
        if len(whole) == len(held[name].tensors):
            parameter.copy_(held[name].shard(whole, model, group.rank(), group.size()))
    if problems:
        raise ConfigError("checkpoint does not fit the model:\n" + "\n".join(f"  - {problem}" for problem in problems))


def model_config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` (as a dict) describes.

    Raises:
        ConfigError: an architecture or a setting that Megatron's modules here do not compute exactly.
    """
    architecture = (hf_config.get("architectures") or ["(none)"])[0]
    family = _family(architecture)
    required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    required += ["rms_norm_eps", "max_position_embeddings"] + (["num_key_value_heads"] if family != "Llama" else [])
    required += ["head_dim"] if family == "Qwen3" else []
    if missing := [key for key in required if hf_config.get(key) is None]:
        raise ConfigError(f"config.json of {architecture} lacks {', '.join(missing)}")
    _expect(hf_config, hidden_act="silu", attention_bias=False, mlp_bias=False)

    heads, hidden = hf_config["num_attention_heads"], hf_config["hidden_size"]
    groups, width = hf_config.get("num_key_value_heads") or heads, hf_config.get("head_dim")
    longest, window = hf_config["max_position_embeddings"], hf_config.get("sliding_window")
    if window is not None and hf_config.get("use_sliding_window", family == "Mistral"):
        longest = min(longest, window)  # a sequence that fits the window never notices it
    rope = {"rope_theta": hf_config.get("rope_theta", 10000.0), **(hf_config.get("rope_scaling") or {})}
    rope |= hf_config.get("rope_parameters") or {}  # what transformers 5 writes
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_scaling.rope_type = {kind!r} in config.json is not supported; expected null or llama3")
    if kind == "llama3":  # constants of megatron-core
        _expect(rope, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)
    return load_config(
        ModelConfig,
        {
            "num_layers": hf_config["num_hidden_layers"],
            "hidden_size": hidden,
            "ffn_hidden_size": hf_config["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": None if groups == heads else groups,
            "head_dim": None if width is None or width * heads == hidden else width,
            "vocab_size": hf_config["vocab_size"],
            "max_sequence_length": longest,
            "rotary_base": rope["rope_theta"],
            "rope_scaling_factor": rope["factor"] if kind == "llama3" else None,
            "norm_epsilon": hf_config["rms_norm_eps"],
            "qkv_bias": family == "Qwen2",
            "qk_norm": family == "Qwen3",
            "tie_embeddings": bool(hf_config.get("tie_word_embeddings", False)),
            "init_std": hf_config.get("initializer_range", 0.02),
        },
    )


def hf_config(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """The `config.json` of the model, so that transformers and inference engines build the same network.

    Raises:
        ConfigError: an unsupported architecture, or one that lacks a feature of the model.
    """
    family = _family(architecture)
    for name, value, owner in (("qkv_bias", model.qkv_bias, "Qwen2"), ("qk_norm", model.qk_norm, "Qwen3")):
        if value != (family == owner):
            raise ConfigError(f"{architecture} needs model.{name} = {family == owner}, the model has {value}")
    if family == "Qwen2" and model.head_width * model.num_attention_heads != model.hidden_size:
        raise ConfigError(f"{architecture} cannot have model.head_dim = {model.head_dim}: it has no such setting")
    config = {
        "architectures": [architecture],
        "model_type": family.lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_sequence_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if model.rope_scaling_factor is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if family == "Mistral":
        config["sliding_window"] = None  # transformers would assume 4096
    return config


def causal_architecture(model: ModelConfig) -> str:
    """The *ForCausalLM with the model's biases and norms. A Mistral model has the modules of a Llama model."""
    return ("Qwen2" if model.qkv_bias else "Qwen3" if model.qk_norm else "Llama") + "ForCausalLM"


def _family(architecture: str) -> str:
    family = architecture.removesuffix("ForCausalLM").removesuffix("ForSequenceClassification")
    if family == architecture or family not in FAMILIES:
        supported = ", ".join(f"{name}ForCausalLM, {name}ForSequenceClassification" for name in FAMILIES)
        raise UnsupportedArchitecture(f"architecture {architecture!r} is not supported; expected one of: {supported}")
    return family


def _expect(settings: Mapping[str, Any], **expected: Any) -> None:
    for key, value in expected.items():
        if (found := settings.get(key, value)) != value:
            raise ConfigError(f"{key} = {found!r} in config.json is not supported; expected {value!r}")


def entries(model: ModelConfig, outputs: int | None = None) -> dict[str, Entry]:
    """All parameters by name, layers numbered over the whole model; `outputs` of a scalar head, None for lm_head."""
    hidden, ffn, width = model.hidden_size, model.ffn_hidden_size, model.head_width
    query, kv = model.num_attention_heads * width, model.kv_heads * width
    found = {"embedding.word_embeddings.weight": _embedding("model.embed_tokens.weight", model)}
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention = theirs + "self_attn."
        layer: dict[str, tuple[_Split, dict[str, Shape]]] = {
            "input_layernorm.weight": ("whole", {theirs + "input_layernorm.weight": (hidden,)}),
            "self_attention.linear_qkv.weight": (
                "qkv",
                {f"{attention}{x}_proj.weight": (rows, hidden) for x, rows in (("q", query), ("k", kv), ("v", kv))},
            ),
            "self_attention.linear_proj.weight": ("columns", {attention + "o_proj.weight": (hidden, query)}),
            "pre_mlp_layernorm.weight": ("whole", {theirs + "post_attention_layernorm.weight": (hidden,)}),
            "mlp.linear_fc1.weight": (
                "gate_up",
                {theirs + "mlp.gate_proj.weight": (ffn, hidden), theirs + "mlp.up_proj.weight": (ffn, hidden)},
            ),
            "mlp.linear_fc2.weight": ("columns", {theirs + "mlp.down_proj.weight": (hidden, ffn)}),
        }
        if model.qkv_bias:
            layer["self_attention.linear_qkv.bias"] = (
                "qkv",
                {f"{attention}{x}_proj.bias": (rows,) for x, rows in (("q", query), ("k", kv), ("v", kv))},
            )
        if model.qk_norm:
            layer["self_attention.q_layernorm.weight"] = ("whole", {attention + "q_norm.weight": (width,)})
            layer["self_attention.k_layernorm.weight"] = ("whole", {attention + "k_norm.weight": (width,)})
        found.update({ours + name: Entry(*entry) for name, entry in layer.items()})
    found["decoder.final_layernorm.weight"] = Entry("whole", {"model.norm.weight": (hidden,)})
    if outputs is not None:
        found["head.weight"] = Entry("whole", {"score.weight": (outputs, hidden)})
        found["head.bias"] = Entry("whole", {"score.bias": (outputs,)})
    elif not model.tie_embeddings:
        found["output_layer.weight"] = _embedding("lm_head.weight", model)
    return found


def _embedding(name: str, model: ModelConfig) -> Entry:
    return Entry("vocabulary", {name: (model.vocab_size, model.hidden_size)})


def _parameters(chunks: list[Any]) -> dict[str, nn.Parameter]:
    """This rank's parameters, named as in `entries` whatever the pipeline stage and the layer spec; no adapters."""
    found = {}
    for chunk in chunks:
        decoder = unwrap(chunk)
        for name, parameter in decoder.named_parameters():
            if f"{lora.SUFFIX}." in name:
                continue
            if name.startswith("decoder.layers."):
                index, rest = name.removeprefix("decoder.layers.").split(".", 1)
                number = decoder.decoder.layers[int(index)].layer_number - 1
                name = f"decoder.layers.{number}.{_FUSED_NORMS.get(rest, rest)}"
            found[name] = parameter
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
