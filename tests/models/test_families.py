"""A family is its description: published models have their published size, and a new family needs no other file."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from hf_models import edit_config, random_model, same_tensors, save, tensors_of
from safetensors.torch import save_file
from tiny import MODEL
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron.checkpoint_weights import read_weights
from nemo_eppo.models import families
from nemo_eppo.models.checkpoint_files import WEIGHTS
from nemo_eppo.models.families import LLAMA
from nemo_eppo.models.family import KEYS, NAMES, Family, Key
from nemo_eppo.models.hf_config import model_config_from_hf
from nemo_eppo.models.hf_directory import HfDirectory
from nemo_eppo.models.hf_names import entries, hf_names
from nemo_eppo.settings.model import Head
from nemo_eppo.tools.convert import HfToMegatron, MegatronToHf

QKV = "self_attention.linear_qkv.weight"
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Gemma 2 2B": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "Phi-3 mini 4k": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_published(name: str) -> None:
    settings, parameters = PUBLISHED[name]
    assert sum(math.prod(shape) for _, shape in hf_names(model_config_from_hf(settings))) == parameters


def test_gemma_2_has_its_window_in_every_other_layer_from_the_first() -> None:
    model = model_config_from_hf(PUBLISHED["Gemma 2 2B"][0])
    assert (model.sliding_window, model.global_layers) == (4096, tuple(range(1, 26, 2)))
    assert model.tie_embeddings, "as transformers takes it where config.json says nothing"


MADE = Family(  # Llama with other tensor names and layer names, and its query, key and value in one tensor
    name="Made",
    keys=LLAMA.keys,
    names={
        **NAMES,
        "embedding.word_embeddings.weight": ("model.tokens.weight",),
        "input_layernorm.weight": ("first_norm.weight",),
        QKV: ("attention.all.weight",),
        "decoder.final_layernorm.weight": ("model.last_norm.weight",),
        "output_layer.weight": ("unembed.weight",),
    },
    layer_prefix="trunk.blocks.",
)


def as_made(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama model's tensors, called and stacked as in MADE."""
    renamed = {
        "model.embed_tokens.weight": "model.tokens.weight",
        "model.norm.weight": "model.last_norm.weight",
        "lm_head.weight": "unembed.weight",
    }
    made = {}
    for name, tensor in llama.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([llama[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        name = renamed.get(name, name).replace("model.layers.", "trunk.blocks.")
        made[name.replace("self_attn.q_proj", "attention.all").replace("input_layernorm", "first_norm")] = tensor
    return made


@pytest.mark.parametrize("kind", ["language model", "tied embeddings", "reward model"])
def test_a_new_family_is_its_description_and_no_more(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "Made", MADE)
    tied = copy.deepcopy(hf_models.FAMILIES["Llama"])
    tied.tie_word_embeddings = True
    monkeypatch.setitem(hf_models.FAMILIES, "tied Llama", tied)
    head: Head = "scalar" if kind == "reward model" else "lm"
    suffix = "ForSequenceClassification" if head == "scalar" else "ForCausalLM"
    network = random_model("tied Llama" if kind == "tied embeddings" else "Llama", scores=int(head == "scalar"))
    llama, made = (save(network, tmp_path / name, max_shard_size="1GB") for name in ("llama", "made"))
    edit_config(llama, nemo_eppo_reward={"mean": 0.5, "std": 2.0})
    edit_config(made, nemo_eppo_reward={"mean": 0.5, "std": 2.0}, architectures=["Made" + suffix])
    expected = as_made(tensors_of(llama))
    assert ("unembed.weight" in expected) == (kind == "language model")
    save_file(expected, made / "model.safetensors")

    for source in (llama, made):
        HfToMegatron(source, tmp_path / f"{source.name}-megatron").run()
    model = model_config_from_hf(json.loads((llama / "config.json").read_text()))
    outputs = 1 if head == "scalar" else None
    ours, theirs = (
        dict(read_weights(tmp_path / f"{name}-megatron" / WEIGHTS, model, outputs)) for name in ("made", "llama")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs), "the same Megatron parameters"
    MegatronToHf(tmp_path / "made-megatron", tmp_path / "back").run()
    same_tensors(tmp_path / "back", made)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["Made" + suffix]


def test_a_tied_output_may_be_stored_too_under_its_familys_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "Made", MADE)
    made = save(random_model("Llama"), tmp_path / "made", max_shard_size="1GB")
    edit_config(made, architectures=["MadeForCausalLM"], tie_word_embeddings=True)
    tensors = as_made(tensors_of(made))
    save_file(tensors, made / "model.safetensors")
    assert HfDirectory(made).model.tie_embeddings
    tensors["lm_head.weight"] = tensors.pop("unembed.weight")
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head.weight: \(67, 32\), which MadeForCausalLM does not have"):
        HfDirectory(made)


def names_without(name: str) -> dict[str, tuple[str, ...]]:
    return {kept: tensors for kept, tensors in NAMES.items() if kept != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"names": {**NAMES, "mlp.linear_fc3.weight": ("x",)}}, "names['mlp.linear_fc3.weight']: Megatron has no such"),
        ({"names": names_without("mlp.linear_fc2.weight")}, "names lacks 'mlp.linear_fc2.weight'"),
        ({"names": names_without("output_layer.weight")}, "names lacks 'output_layer.weight'"),
        ({"features": {"post_norms": True}}, "names lacks 'mlp_bda.norm.weight'"),
        (
            {"features": {"qkv_bias": True}, "names": names_without("self_attention.linear_qkv.bias")},
            "names lacks 'self_attention.linear_qkv.bias'",
        ),
        (
            {"keys": {**KEYS, "norms": Key("qk_norm")}, "names": names_without("self_attention.k_layernorm.weight")},
            "names lacks 'self_attention.k_layernorm.weight'",
        ),
        ({"names": {**NAMES, QKV: ("q", "kv")}}, f"names['{QKV}'] = ('q', 'kv'): expected 1 or 3 tensors, found 2"),
        (
            {"names": {**NAMES, "self_attention.linear_qkv.bias": ()}},
            "names['self_attention.linear_qkv.bias'] = (): expected 1 or 3 tensors, found 0",
        ),
        (
            {"names": {**NAMES, "mlp.linear_fc1.weight": ("a", "b", "c")}},
            "names['mlp.linear_fc1.weight'] = ('a', 'b', 'c'): expected 1 or 2 tensors, found 3",
        ),
        (
            {"names": {**NAMES, "input_layernorm.weight": ("a", "b")}},
            "names['input_layernorm.weight'] = ('a', 'b'): expected 1 tensor, found 2",
        ),
    ],
)
def test_a_family_whose_names_do_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        Family(name="Made", **change)
    assert str(error.value).startswith("family Made:\n")


def test_all_that_is_wrong_with_a_familys_names_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Family(name="Made", names={**names_without("mlp.linear_fc2.weight"), "x": ("x",), QKV: ()})
    assert all(said in str(error.value) for said in ("lacks 'mlp.linear_fc2.weight'", "names['x']", f"names['{QKV}']"))


def test_a_name_of_a_feature_that_the_family_lacks_may_be_left_out() -> None:
    assert Family(name="Made", names=names_without("self_attention.q_layernorm.weight")).name == "Made"


def test_the_names_of_a_family_are_the_parameters_of_a_model_with_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"qkv_bias": True, "qk_norm": True, "post_norms": True}
    with pytest.raises(ConfigError) as error:
        Family(name="All", features=features, names={"x": ("x",)})
    known = set(str(error.value).split("expected ")[1].split(", "))
    names = {name: (name,) for name in known}
    monkeypatch.setitem(families.FAMILIES, "All", Family(name="All", features=features, names=names))
    parameters = entries(MODEL.model_copy(update={"family": "All", **features}))
    assert {re.sub(r"^decoder\.layers\.\d+\.", "", name) for name in parameters} == known
