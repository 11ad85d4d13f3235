"""Reads the model that the model_config.yaml of a .nemo file describes; a setting that is not supported is an error.

Names, defaults and their use are those of `MegatronGPTModel` and `MegatronBaseModel` in NeMo 1.23 to 2.3, and of
`MegatronGPTRewardModel` in NeMo-Aligner 0.7. Settings of training, speed and layout are ignored.
"""

from collections.abc import Mapping
from typing import Any

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.models.hf_directory import RewardStatistics
from nemo_eppo.settings.model import Head, ModelConfig

Leaves = Mapping[str, Any]
"""Values of the file by their dotted keys."""

_OFF = (False, None)
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mcore_gpt": (False, (True,)),
    "name": ("", ("", "te_gpt")),
    "position_embedding_type": ("learned_absolute", ("rope",)),
    "rotary_percentage": (1.0, (1.0,)),
    "rotary_interleaved": (False, _OFF),
    "normalization": ("layernorm", ("rmsnorm", "RMSNorm")),
    "layernorm_zero_centered_gamma": (False, _OFF),
    "bias": (True, (False,)),
    "activation": ("gelu", ("fast-swiglu", "swiglu")),
    "openai_gelu": (False, _OFF),
    "num_moe_experts": (None, (None,)),
    "multi_latent_attention": (False, _OFF),
    "qk_layernorm": (False, _OFF),
    "softmax_scale": (None, (None,)),
    "apply_embedding_scaling": (False, _OFF),
    "drop_layers": (None, (None,)),
}
"""Maps keys to NeMo's default, for files without them, and the supported values."""

_FIXED_REWARD: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "reward_model_type": ("binary_ranking", ("binary_ranking",)),
    "use_avg_pool": (False, _OFF),
}
"""The same, for models with a reward head."""

_KEYS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "norm_epsilon",
    "init_method_std": "init_std",
    "rotary_base": "rotary_base",
    "qkv_bias": "qkv_bias",
}
"""Maps keys to fields of ModelConfig, whose defaults are NeMo's."""

_LENGTHS = ("encoder_seq_length", "max_position_embeddings")


def nemo_model_config(leaves: Leaves, vocab_size: int, head: Head) -> ModelConfig:
    """Return the model that a model_config.yaml describes.

    Args:
        vocab_size: rows of the embedding, which NeMo pads; the file does not give them.
        head: lm, or scalar for a reward model or critic.

    Raises:
        ConfigError: values are not supported, or required keys are missing; the message lists all.
    """
    _check_fixed(leaves, _FIXED if head == "lm" else {**_FIXED, **_FIXED_REWARD})
    required = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    if missing := [key for key in required if leaves.get(key) is None]:
        raise ConfigError(f"{', '.join(missing)}: required, but not set")
    values = {field: leaves[key] for key, field in _KEYS.items() if leaves.get(key) is not None}
    heads = values["num_attention_heads"]
    if values.get("num_query_groups") == heads:
        values["num_query_groups"] = None
    if values.get("head_dim") is not None and values["head_dim"] * heads == values["hidden_size"]:
        values["head_dim"] = None
    values["max_sequence_length"] = max((leaves[key] for key in _LENGTHS if leaves.get(key) is not None), default=512)
    values["sliding_window"] = _sliding_window(leaves)
    values["rope_scaling"] = _rope_scaling(leaves, head)
    values["tie_embeddings"] = head == "lm" and leaves.get("share_embeddings_and_output_weights", True)
    return load_config(ModelConfig, values | {"vocab_size": vocab_size})


def nemo_reward_state(leaves: Leaves) -> dict[str, Any]:
    """Return the statistics of a reward model's scores for its manifest: mean 0 and std 1 if NeMo-Aligner does not
    standardise them; none for a critic, which gives a value for every token."""
    if leaves.get("output_sequence"):
        return {}
    if not leaves.get("reward_standardization.enable"):
        return RewardStatistics(mean=0.0, std=1.0).model_dump()
    statistics = {name: leaves.get(f"reward_standardization.{name}") for name in ("mean", "std")}
    return load_config(RewardStatistics, statistics).model_dump()


def _check_fixed(leaves: Leaves, fixed: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    problems = []
    for key, (default, supported) in fixed.items():
        value = leaves.get(key, default)
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in supported):
            expected = " or ".join(map(repr, supported))
            absent = "" if key in leaves else " (the file does not set it: NeMo's default)"
            problems.append(f"{key} = {value!r}{absent}: expected {expected}")
    problems += [
        f"{key} = {value!r}: expected nothing below mcore_customization_config"
        for key, value in leaves.items()
        if key.startswith("mcore_customization_config.") and value is not None
    ]
    if problems:
        raise ConfigError("this model cannot be computed here:" + "".join(f"\n  - {problem}" for problem in problems))


def _sliding_window(leaves: Leaves) -> int | None:
    """Return how many tokens, itself included, a token attends to; NeMo's window does not count the token itself."""
    window = leaves.get("window_size")
    if window is None:
        return None
    if not isinstance(window, list) or len(window) != 2 or window[1] != 0 or not window[0] >= 0:
        raise ConfigError(f"window_size = {window!r}: expected null, or a number of tokens before a token and 0")
    return int(window[0]) + 1


def _rope_scaling(leaves: Leaves, head: Head) -> dict[str, Any] | None:
    factor = leaves.get("seq_len_interpolation_factor")
    # NeMo-Aligner's reward models and critics ignore the second key
    stretched = head == "lm" and leaves.get("scale_positional_embedding", False)
    if factor is not None and stretched:
        raise ConfigError(
            f"seq_len_interpolation_factor = {factor} and scale_positional_embedding = true: NeMo stretches positions "
            "twice, which is not computed here. If only Llama 3.1's own stretching is meant, set the former to null "
            "(NeMo 2.0 and 2.1 wrote both when they converted Llama 3.1)"
        )
    if factor is not None:
        return {"rope_type": "linear", "factor": factor}
    if not stretched:
        return None
    return {
        "rope_type": "llama3",
        "factor": leaves.get("scale_factor", 8),
        "low_freq_factor": leaves.get("low_freq_factor", 1),
        "high_freq_factor": leaves.get("high_freq_factor", 4),
        "original_max_position_embeddings": leaves.get("old_context_len", 8192),
    }
