"""What a model family is: the one description that config.json, tensor names, modules and estimates are read from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nemo_eppo.config import ConfigError
from nemo_eppo.models.model_config import ModelConfig

REQUIRED: Any = object()
"""Default of a key that every config.json of the family has to have."""


class Key(NamedTuple):
    """Where a key of config.json goes."""

    field: str
    """The field of ModelConfig that holds it."""
    default: Any = REQUIRED
    """What transformers takes where config.json lacks the key; null in config.json is null."""
    switch: str | None = None
    """A key of config.json that has to be true, or else the value counts as null."""


KEYS: Mapping[str, Key] = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "intermediate_size": Key("ffn_hidden_size"),
    "num_hidden_layers": Key("num_layers"),
    "num_attention_heads": Key("num_attention_heads"),
    "rms_norm_eps": Key("norm_epsilon"),
    "max_position_embeddings": Key("max_sequence_length"),
    "num_key_value_heads": Key("num_query_groups"),
    "head_dim": Key("head_dim", None),
    "initializer_range": Key("init_std", 0.02),
    "tie_word_embeddings": Key("tie_embeddings", False),
}
"""Keys that all families have; rotary settings are read and written apart from them."""

FIXED: Mapping[str, Any] = {"hidden_act": "silu"}
"""Settings of config.json that most families have in common and cannot change."""
_ATTENTION, _MLP = "self_attention.", "mlp."
NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "input_layernorm.weight": ("input_layernorm.weight",),
    f"{_ATTENTION}linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    f"{_ATTENTION}linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    f"{_ATTENTION}q_layernorm.weight": ("self_attn.q_norm.weight",),
    f"{_ATTENTION}k_layernorm.weight": ("self_attn.k_norm.weight",),
    f"{_ATTENTION}linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    f"{_MLP}linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    f"{_MLP}linear_fc2.weight": ("mlp.down_proj.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
"""Hugging Face tensors of each Megatron parameter, those of a layer without its prefix. One name for a parameter that
others have in parts (query, key, value; gate, up) is of a tensor that stacks them in this order."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that transformers computes with the same classes."""

    name: str
    """Architectures are this with ForCausalLM or ForSequenceClassification behind; in lower case it is model_type."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that have this value in all its models; those without a key have ModelConfig's default."""
    keys: Mapping[str, Key] = field(default_factory=lambda: KEYS)
    fixed: Mapping[str, Any] = field(default_factory=lambda: FIXED)
    """Settings of config.json that have this value or are left out; they are written."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NAMES)
    global_layers: Callable[[Mapping[str, Any]], Sequence[int]] | None = None
    """config.json -> its layers without a sliding window, where it has no layer_types; None where layers are alike."""
    tensorrt_llm: bool = False
    """Whether generation with TensorRT-LLM knows it."""

    def check(self, model: ModelConfig, architecture: str) -> None:
        """Raise ConfigError if a model has a feature that the family lacks, or lacks one that it has."""
        free = {key.field for key in self.keys.values()} | {"family", "rotary_base", "rope_scaling_factor"}
        free |= {"global_layers"} if self.global_layers else set()
        for name, declared in ModelConfig.model_fields.items():
            if name in free and name not in self.features:
                continue
            expected, found = self.features.get(name, declared.default), getattr(model, name)
            if found == expected or (
                name == "head_dim" and model.head_width * model.num_attention_heads == model.hidden_size
            ):
                continue
            if expected is None:
                raise ConfigError(f"{architecture} cannot have model.{name} = {found}: it has no such setting")
            raise ConfigError(f"{architecture} needs model.{name} = {expected}, the model has {found}")
