"""Settings of the Llama family between a Hugging Face `config.json` and a ModelConfig."""

from collections.abc import Mapping
from typing import Any

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.models.model_config import ModelConfig

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Supported architectures are these with `ForCausalLM` or `ForSequenceClassification` behind."""


class UnsupportedArchitecture(ConfigError):
    """A model of none of the families."""


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
