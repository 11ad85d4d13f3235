"""A family is its description: published models have their published size, and a new family needs no other file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import random_model, same_tensors, save, tensors_of
from safetensors.torch import save_file

from nemo_eppo.megatron.checkpoint_weights import read_weights
from nemo_eppo.models import families
from nemo_eppo.models.checkpoint_files import WEIGHTS
from nemo_eppo.models.families import LLAMA
from nemo_eppo.models.family import NAMES, Family
from nemo_eppo.models.hf_config import model_config_from_hf
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.tools.convert import HfToMegatron, MegatronToHf

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


def test_a_new_family_is_its_description_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up one: Llama with other tensor names, and its query, key and value in one tensor."""
    qkv, norm = "self_attention.linear_qkv.weight", "input_layernorm.weight"
    names = {**NAMES, qkv: ("self_attn.all.weight",), norm: ("first_norm.weight",)}
    monkeypatch.setitem(families.FAMILIES, "Made", Family(name="Made", keys=LLAMA.keys, names=names))

    llama = save(random_model("Llama"), tmp_path / "llama")
    made = save(random_model("Llama"), tmp_path / "made", max_shard_size="1GB")
    tensors = tensors_of(made)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        parts = [tensors.pop(f"{prefix}self_attn.{x}_proj.weight") for x in "qkv"]
        tensors[f"{prefix}self_attn.all.weight"] = torch.cat(parts)
        tensors[f"{prefix}first_norm.weight"] = tensors.pop(f"{prefix}input_layernorm.weight")
    save_file(tensors, made / "model.safetensors")
    config = json.loads((made / "config.json").read_text()) | {"architectures": ["MadeForCausalLM"]}
    (made / "config.json").write_text(json.dumps(config))

    for source in (llama, made):
        HfToMegatron(source, tmp_path / f"{source.name}-megatron").run()
    model = model_config_from_hf(json.loads((llama / "config.json").read_text()))
    ours, theirs = (
        dict(read_weights(tmp_path / f"{name}-megatron" / WEIGHTS, model, None)) for name in ("made", "llama")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs), "the same Megatron parameters"
    MegatronToHf(tmp_path / "made-megatron", tmp_path / "back", "lm").run()
    same_tensors(tmp_path / "back", made)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["MadeForCausalLM"]
