"""Converts between a Hugging Face `config.json` and a ModelConfig, as the model's family describes."""

from collections.abc import Mapping
from typing import Any, get_args

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.models.families import HEADS, family_of, family_of_architecture
from nemo_eppo.models.family import REQUIRED, Family, Key
from nemo_eppo.settings.model import ModelConfig, RopeType

_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
_LAYER_TYPES = ("sliding_attention", "full_attention")


def model_config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a `config.json` (as a dict) describes.

    Raises:
        ConfigError: an architecture or a setting that our modules do not compute exactly.
    """
    architecture = (hf_config.get("architectures") or ["(none)"])[0]
    family = family_of_architecture(architecture)
    required = [name for name, key in family.keys.items() if key.default is REQUIRED]
    if missing := [name for name in required if hf_config.get(name) is None]:
        raise ConfigError(f"config.json of {architecture} lacks {', '.join(missing)}")
    _expect(hf_config, {**_NO_BIASES, **family.fixed})
    values = {**family.features, **{key.field: _value(hf_config, name, key) for name, key in family.keys.items()}}
    heads = values["num_attention_heads"]
    if values["num_query_groups"] == heads:
        values["num_query_groups"] = None
    if values["head_dim"] is not None and values["head_dim"] * heads == values["hidden_size"]:
        values["head_dim"] = None
    model = load_config(ModelConfig, values | _windows(hf_config, family, values) | _rotary(hf_config))
    family.check(model, architecture)
    named = model.model_copy(update={"family": family.name})
    return model if family_of(model) is family else named


def hf_config(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """Return the model's `config.json`, from which transformers and inference engines build the same network.

    Raises:
        ConfigError: an unsupported architecture, or one that lacks a feature of the model.
    """
    family = family_of_architecture(architecture)
    family.check(model, architecture)
    values = model.model_dump() | {"num_query_groups": model.kv_heads, "head_dim": model.head_width}
    config = {"architectures": [architecture], "model_type": family.name.lower(), **family.fixed}
    for name, key in family.keys.items():
        config[name] = values[key.field]
        if key.switch is not None:
            config[key.switch] = config[name] is not None
    if family.global_layers is not None:
        everywhere = range(model.num_layers) if model.sliding_window is None else model.global_layers
        config["layer_types"] = [_LAYER_TYPES[layer in everywhere] for layer in range(model.num_layers)]
        if family.first_window and model.sliding_window and set(everywhere) == set(range(len(everywhere))):
            config[family.first_window] = len(everywhere)
    config |= {"rope_theta": model.rotary_base, "rope_scaling": None}
    if model.rope_scaling is not None:
        config["rope_scaling"] = model.rope_scaling.model_dump(exclude_none=True)
    return config


def causal_architecture(model: ModelConfig) -> str:
    """Return the *ForCausalLM architecture of the model's family."""
    return family_of(model).name + HEADS[0]


def _value(hf_config: Mapping[str, Any], name: str, key: Key) -> Any:
    if key.switch is not None and not hf_config.get(key.switch, False):
        return None
    return hf_config.get(name, key.default)


def _windows(hf_config: Mapping[str, Any], family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig that say which layers have no sliding window."""
    if family.global_layers is None or values["sliding_window"] is None:
        return {}
    layers = range(values["num_layers"])
    types = hf_config.get("layer_types")
    if types is None:
        everywhere = family.global_layers(hf_config)
    elif len(types) != len(layers) or set(types) - set(_LAYER_TYPES):
        raise ConfigError(
            f"layer_types = {types!r} in config.json; expected {' or '.join(_LAYER_TYPES)} for each layer"
        )
    else:
        everywhere = [layer for layer in layers if types[layer] == _LAYER_TYPES[1]]
    return {"global_layers": tuple(layer for layer in layers if layer in everywhere)}


def _rotary(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary fields of ModelConfig; ConfigError for an unsupported kind of scaling."""
    defaults = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    rope = {key: hf_config.get(key, default) for key, default in defaults.items()}
    rope |= hf_config.get("rope_scaling") or {}
    rope |= hf_config.get("rope_parameters") or {}  # transformers 5 writes these
    older = rope.pop("type", "default")
    kind, base = rope.pop("rope_type", older), rope.pop("rope_theta")
    if kind != "default" and kind not in get_args(RopeType):
        raise ConfigError(
            f"rope_scaling.rope_type = {kind!r} in config.json is not supported; expected null, "
            f"{' or '.join(get_args(RopeType))}"
        )
    _expect(rope, {"partial_rotary_factor": 1.0})
    del rope["partial_rotary_factor"]
    if kind == "default":
        _expect(rope, dict.fromkeys(rope))
        return {"rotary_base": base}
    if kind == "yarn" and rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = hf_config["max_position_embeddings"]  # as transformers assumes
    return {"rotary_base": base, "rope_scaling": {"rope_type": kind, **rope}}


def _expect(settings: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if (found := settings.get(key, value)) != value:
            raise ConfigError(f"{key} = {found!r} in config.json is not supported; expected {value!r}")
