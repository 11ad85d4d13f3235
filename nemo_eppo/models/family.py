"""Describes a model family: its keys of config.json, its tensor names and its features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nemo_eppo.config import ConfigError
from nemo_eppo.settings.model import ModelConfig

REQUIRED: Any = object()
"""Marks a key that every config.json of the family has to have."""


class Key(NamedTuple):
    """Maps a key of config.json to a field of ModelConfig."""

    field: str
    """The field of ModelConfig that holds it."""
    default: Any = REQUIRED
    """Value that transformers assumes where config.json lacks the key; a null in config.json stays null."""
    switch: str | None = None
    """A key of config.json that has to be true, or the value counts as null; None for no such key."""


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
"""Keys that all families have. Rotary settings are not among them; hf_config.py converts these."""

FIXED: Mapping[str, Any] = {"hidden_act": "silu"}
"""Settings of config.json that have this one value in most families."""
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
"""Hugging Face tensors of each Megatron parameter, without the prefix of its layer. A parameter with parts (query, key,
value; gate, up) has a name for each, or one name for a tensor that stacks them in this order."""
_OPTIONAL = {
    f"{_ATTENTION}linear_qkv.bias": "qkv_bias",
    f"{_ATTENTION}q_layernorm.weight": "qk_norm",
    f"{_ATTENTION}k_layernorm.weight": "qk_norm",
    "self_attn_bda.norm.weight": "post_norms",
    "mlp_bda.norm.weight": "post_norms",
}
"""Parameters that not all models have, and the field of ModelConfig that gives a model one."""
_PARTS = {f"{_ATTENTION}linear_qkv.weight": 3, f"{_ATTENTION}linear_qkv.bias": 3, f"{_MLP}linear_fc1.weight": 2}
"""Number of parts of the parameters that have more than one."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that transformers computes with the same classes.

    Raises:
        ConfigError: `names` has a parameter that Megatron does not have, lacks one that the family's models have, or
            gives one another number of tensors than it has parts; all of these are listed.
    """

    name: str
    """Architectures are this name + ForCausalLM or ForSequenceClassification; model_type is it in lower case."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig with the same value in all its models; fields without a key either have their default."""
    keys: Mapping[str, Key] = field(default_factory=lambda: KEYS)
    """Keys of its config.json."""
    fixed: Mapping[str, Any] = field(default_factory=lambda: FIXED)
    """Settings of config.json that are always written, and have this value or are missing when read."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NAMES)
    """Hugging Face tensors of each Megatron parameter, as in NAMES."""
    layer_prefix: str = "model.layers."
    """Tensors of layer i, counted from 0, are called this + "i." + the name in `names`."""
    global_layers: Callable[[Mapping[str, Any]], Sequence[int]] | None = None
    """config.json -> layers, from 0, without a sliding window, if it has no layer_types; None if layers are alike."""
    first_window: str | None = None
    """Key of config.json that holds the first layer, from 0, with a sliding window, for readers without layer_types."""
    tensorrt_llm: bool = False
    """Whether TensorRT-LLM is known to compute it as training does."""

    def __post_init__(self) -> None:
        varying = {key.field for key in self.keys.values()} | {name for name, value in self.features.items() if value}
        known = {**dict.fromkeys(NAMES), **_OPTIONAL}
        problems = [
            f"names lacks {name!r}"
            for name, feature in known.items()
            if name not in self.names and (feature is None or feature in varying)
        ]
        for name, tensors in self.names.items():
            parts = _PARTS.get(name, 1)
            if name not in known:
                problems.append(f"names[{name!r}]: Megatron has no such parameter; expected {', '.join(known)}")
            elif len(tensors) not in (1, parts):
                expected = "1 tensor" if parts == 1 else f"1 or {parts} tensors"
                problems.append(f"names[{name!r}] = {tensors!r}: expected {expected}, found {len(tensors)}")
        if problems:
            raise ConfigError(f"family {self.name}:" + "".join(f"\n  - {problem}" for problem in problems))

    def check(self, model: ModelConfig, architecture: str) -> None:
        """Raise ConfigError if a model has a feature that the family lacks, or lacks one that it has."""
        free = {key.field for key in self.keys.values()} | {"family", "rotary_base", "rope_scaling"}
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
