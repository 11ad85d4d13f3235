"""The supported model families; to add one, describe it in this file as a `Family`."""

from nemo_eppo.config import ConfigError
from nemo_eppo.models.family import FIXED, KEYS, NAMES, Family, Key
from nemo_eppo.settings.model import ModelConfig

HEADS = ("ForCausalLM", "ForSequenceClassification")


LLAMA = Family(
    name="Llama",
    keys={**KEYS, "num_key_value_heads": Key("num_query_groups", None)},
    tensorrt_llm=True,
)
_QWEN_KEYS = {**KEYS, "sliding_window": Key("sliding_window", 4096, switch="use_sliding_window")}
QWEN2 = Family(
    name="Qwen2",
    features={"qkv_bias": True, "head_dim": None},
    keys=_QWEN_KEYS,
    global_layers=lambda config: range(config.get("max_window_layers", 28)),
    first_window="max_window_layers",
    tensorrt_llm=True,
)
QWEN3 = Family(
    name="Qwen3",
    features={"qk_norm": True},
    keys={**_QWEN_KEYS, "head_dim": Key("head_dim")},
    global_layers=QWEN2.global_layers,
    first_window=QWEN2.first_window,
    tensorrt_llm=True,
)
MISTRAL = Family(
    name="Mistral",
    keys={**KEYS, "sliding_window": Key("sliding_window", 4096)},
    tensorrt_llm=True,
)
GEMMA2 = Family(
    name="Gemma2",
    features={"activation": "gelu_tanh", "norm_plus_one": True, "post_norms": True, "scale_embedding": True},
    keys={
        **KEYS,
        "head_dim": Key("head_dim"),
        "tie_word_embeddings": Key("tie_embeddings", True),
        "query_pre_attn_scalar": Key("query_pre_attn_scalar"),
        "attn_logit_softcapping": Key("attention_softcap", 50.0),
        "final_logit_softcapping": Key("logit_softcap", 30.0),
        "sliding_window": Key("sliding_window"),
    },
    fixed={"hidden_activation": "gelu_pytorch_tanh"},
    names={
        **NAMES,
        "self_attn_bda.norm.weight": ("post_attention_layernorm.weight",),
        "pre_mlp_layernorm.weight": ("pre_feedforward_layernorm.weight",),
        "mlp_bda.norm.weight": ("post_feedforward_layernorm.weight",),
    },
    global_layers=lambda config: range(1, config["num_hidden_layers"], 2),
)
PHI3 = Family(
    name="Phi3",
    features={"head_dim": None, "rope_scaling": None},
    keys={
        **KEYS,
        "num_key_value_heads": Key("num_query_groups", None),
        "sliding_window": Key("sliding_window", None),
    },
    fixed={**FIXED, "partial_rotary_factor": 1.0},
    names={
        **NAMES,
        "self_attention.linear_qkv.weight": ("self_attn.qkv_proj.weight",),
        "mlp.linear_fc1.weight": ("mlp.gate_up_proj.weight",),
    },
)
FAMILIES = {family.name: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA2, PHI3)}
"""Families by name, in the order in which `family_of` tries them."""


def family_of_architecture(architecture: str) -> Family:
    """Return the family of an `architectures` entry of config.json; ConfigError, naming all, if there is none."""
    for family in FAMILIES.values():
        if architecture in [family.name + head for head in HEADS]:
            return family
    supported = ", ".join(name + head for name in FAMILIES for head in HEADS)
    raise ConfigError(f"architecture {architecture!r} is not supported; expected one of: {supported}")


def family_of(model: ModelConfig) -> Family:
    """Return the family that the model names or, if it names none, the first that has its features.

    Raises:
        ConfigError: the name is unknown, its models have other features, or no family has these.
    """
    if model.family is not None:
        family = family_of_architecture(model.family + HEADS[0])
        family.check(model, model.family)
        return family
    problems = []
    for family in FAMILIES.values():
        try:
            family.check(model, family.name)
        except ConfigError as problem:
            problems.append(str(problem))
        else:
            return family
    raise ConfigError("no supported family has all features of the model:\n  - " + "\n  - ".join(problems))
