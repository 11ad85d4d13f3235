"""Hugging Face weights and settings survive the way into Megatron and back, in every layout, bit by bit."""

import re
from typing import Any

import pytest
import torch
from distributed import run_ranks
from features import DYNAMIC, GEMMA2, LINEAR, LLAMA3, PHI3, YARN
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron.model import build_model, unwrap
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.megatron.weights import export_tensors, load_tensors
from nemo_eppo.models.hf_config import causal_architecture, hf_config, model_config_from_hf
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.settings.model import ModelConfig, ParallelConfig, RopeScaling

LLAMA = ModelConfig(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=101,
    max_sequence_length=64,
)
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA.model_copy(update={"num_query_groups": None, "head_dim": 10, "sliding_window": 9}),
    "Qwen2ForCausalLM": LLAMA.model_copy(update={"qkv_bias": True, "tie_embeddings": True}),
    "Qwen3ForCausalLM": LLAMA.model_copy(update={"qk_norm": True, "head_dim": 8, "tie_embeddings": True}),
    "Gemma2ForCausalLM": LLAMA.model_copy(update=GEMMA2),
    "Phi3ForCausalLM": LLAMA.model_copy(update=PHI3),
}
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "TP1": ({}, 1),
    "TP2": ({"tensor_model_parallel_size": 2}, 2),
    "PP2": ({"pipeline_model_parallel_size": 2}, 2),
    "PP2+VPP2": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 2),
    "TP2 x PP2": ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4),
}


def random_tensors(model: ModelConfig, outputs: int | None = None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    shapes = dict(hf_names(model))
    if outputs is not None:
        shapes.pop("lm_head.weight", None)
        shapes |= {"score.weight": (outputs, model.hidden_size), "score.bias": (outputs,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected), "the same names in the same order"
    for name, tensor in got.items():
        assert tensor.is_contiguous(), name
        assert torch.equal(tensor, expected[name]), name


def there_and_back(layout: dict[str, Any], fuse_norms: bool = False) -> None:
    parallel = ParallelConfig(**layout)
    initialize(parallel, seed=0)
    for model in FAMILIES.values():
        chunks = build_model(model, parallel, head="lm")
        if fuse_norms:
            for chunk in chunks:
                fuse(chunk)
        tensors = random_tensors(model)
        load_tensors(chunks, model, tensors.__getitem__)
        same(dict(export_tensors(chunks, model)), tensors)
    critic = build_model(LLAMA, parallel, head="scalar")
    tensors = random_tensors(LLAMA, outputs=1)
    load_tensors(critic, LLAMA, tensors.__getitem__)
    same(dict(export_tensors(critic, LLAMA)), tensors)


def fuse(chunk: nn.Module) -> None:
    """Name the norms as TransformerEngine's layers do."""
    for layer in unwrap(chunk).decoder.layers:
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
        layer.input_layernorm = layer.pre_mlp_layernorm = nn.Identity()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_survive_the_way_there_and_back(layout: str) -> None:
    run_ranks(there_and_back, LAYOUTS[layout][1], LAYOUTS[layout][0])


def test_norms_that_transformer_engine_fuses_are_found() -> None:
    run_ranks(there_and_back, 2, LAYOUTS["TP2"][0], True)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(architecture: str) -> None:
    model = FAMILIES[architecture]
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**hf_config(model, architecture), pad_token_id=None)
    )
    expected = {name: tuple(p.shape) for name, p in network.named_parameters()}  # without a tied lm_head
    assert dict(hf_names(model)) == expected


def names_read(layout: dict[str, Any]) -> set[str]:
    parallel = ParallelConfig(**layout)
    initialize(parallel, seed=0)
    model, read = FAMILIES["Qwen2ForCausalLM"], set()
    tensors = random_tensors(model)

    def source(name: str) -> Tensor:
        read.add(name)
        return tensors[name]

    load_tensors(build_model(model, parallel, head="lm"), model, source)
    return read


def test_a_stage_reads_only_what_it_holds() -> None:
    first, last = run_ranks(names_read, 2, LAYOUTS["PP2"][0])
    assert first | last == set(dict(hf_names(FAMILIES["Qwen2ForCausalLM"])))
    assert first & last == {"model.embed_tokens.weight"}, "tied: the last stage projects with it"
    assert "model.layers.1.mlp.up_proj.weight" in first
    assert "model.layers.2.mlp.up_proj.weight" in last


def padding_rows() -> Tensor:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    initialize(parallel, seed=0)
    chunks = build_model(LLAMA, parallel, head="lm")
    load_tensors(chunks, LLAMA, random_tensors(LLAMA).__getitem__)
    return unwrap(chunks[0]).embedding.word_embeddings.weight.detach()


def test_padding_of_the_vocabulary_is_zero() -> None:
    first, last = run_ranks(padding_rows, 2)
    assert first.shape == last.shape == (56, 24)
    assert first.any(dim=1).all()
    assert last.any(dim=1).tolist() == [True] * 45 + [False] * 11


def exported_copies() -> None:
    parallel = ParallelConfig()
    initialize(parallel, seed=0)
    for precision in ("fp32", "bf16"):
        chunks = build_model(LLAMA, parallel, head="scalar", precision=precision)
        before = dict(export_tensors(chunks, LLAMA))
        for tensor in dict(export_tensors(chunks, LLAMA)).values():
            tensor.fill_(7)
        same(dict(export_tensors(chunks, LLAMA)), before)
        for name, tensor in before.items():
            half = precision == "bf16" and not name.startswith("score.")
            assert tensor.dtype == (torch.bfloat16 if half else torch.float32), name


def test_exported_tensors_are_copies_in_the_precision_of_the_model() -> None:
    run_ranks(exported_copies, 1)


def complaint(remove: str, cut: str) -> str:
    parallel = ParallelConfig()
    initialize(parallel, seed=0)
    tensors = random_tensors(LLAMA)
    del tensors[remove]
    tensors[cut] = tensors[cut][:-1]
    with pytest.raises(ConfigError) as error:
        load_tensors(build_model(LLAMA, parallel, head="lm"), LLAMA, tensors.__getitem__)
    return str(error.value)


def test_missing_and_misshapen_tensors_are_all_named() -> None:
    said = run_ranks(complaint, 1, "model.norm.weight", "model.layers.2.self_attn.k_proj.weight")[0]
    assert "model.norm.weight: expected (24,), found no such tensor" in said
    assert "model.layers.2.self_attn.k_proj.weight: expected (12, 24), found (11, 24)" in said
    assert said.count("\n") == 2


def heads() -> None:
    parallel = ParallelConfig()
    initialize(parallel, seed=0)
    tensors = random_tensors(LLAMA, outputs=1)
    critic = build_model(LLAMA, parallel, head="scalar")
    unwrap(critic[0]).head.bias.data.fill_(3)
    tensors["score.bias"] = torch.zeros(1)
    load_tensors(critic, LLAMA, tensors.__getitem__)
    assert unwrap(critic[0]).head.bias.tolist() == [0.0]
    fresh = build_model(LLAMA, parallel, head="scalar")
    drawn = unwrap(fresh[0]).head.weight.detach().clone()
    del tensors["score.weight"]
    with pytest.raises(ConfigError, match=re.escape("score.weight: expected (1, 24), found no such tensor")):
        load_tensors(fresh, LLAMA, tensors.__getitem__)
    load_tensors(fresh, LLAMA, tensors.__getitem__, fresh_head=True)
    assert torch.equal(unwrap(fresh[0]).head.weight, drawn)
    assert drawn.any()


def test_head_may_lack_a_bias_and_stays_fresh_only_on_request() -> None:
    run_ranks(heads, 1)


SETTINGS = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "head_dim": 8,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


OWN: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 4096},
    "Qwen2": {"qkv_bias": True, "head_dim": None},
    "Qwen3": {"qk_norm": True},
    "Phi3": {"family": "Phi3", "head_dim": None},
    "Gemma2": {
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "post_norms": True,
        "scale_embedding": True,
        "query_pre_attn_scalar": 256,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "sliding_window": 4096,
        "global_layers": (1, 3),
    },
}


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma2Config, Phi3Config])
def test_settings_are_read_from_configs_of_transformers(kind: Any) -> None:
    family = kind.__name__.removesuffix("Config")
    settings = SETTINGS if family not in ("Qwen2", "Phi3") else {k: v for k, v in SETTINGS.items() if k != "head_dim"}
    config = kind(**settings, rope_theta=5e5, rms_norm_eps=1e-6, tie_word_embeddings=True, initializer_range=0.03)
    for head in ("ForCausalLM", "ForSequenceClassification"):
        expected: dict[str, Any] = {
            "num_layers": 4,
            "hidden_size": 24,
            "ffn_hidden_size": 20,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "head_dim": 8,
            "vocab_size": 101,
            "max_sequence_length": 8192,
            "rotary_base": 5e5,
            "norm_epsilon": 1e-6,
            "tie_embeddings": True,
            "init_std": 0.03,
        }
        for written in (config.to_dict(), config.to_diff_dict()):  # the second is what save_pretrained writes
            found = model_config_from_hf(written | {"architectures": [family + head]})
            assert found == ModelConfig(**expected | OWN.get(family, {}))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_settings_survive_the_way_there_and_back(architecture: str) -> None:
    for scaling in (None, LLAMA3, LINEAR, DYNAMIC, YARN):
        model = FAMILIES[architecture].model_copy(update={"rope_scaling": scaling, "rotary_base": 5e5})
        if scaling is not None and architecture == "Phi3ForCausalLM":  # transformers has none of these for it
            with pytest.raises(ConfigError, match=r"Phi3ForCausalLM cannot have model\.rope_scaling = rope_type="):
                hf_config(model, architecture)
            continue
        assert model_config_from_hf(hf_config(model, architecture)) == model


def test_every_llama_model_can_be_written_as_mistral_and_phi3_and_is_remembered_as_such() -> None:
    for architecture in ("MistralForCausalLM", "Phi3ForCausalLM"):
        read = model_config_from_hf(hf_config(LLAMA, architecture))
        assert read == LLAMA.model_copy(update={"family": architecture.removesuffix("ForCausalLM")})
        assert causal_architecture(read) == architecture
    assert causal_architecture(LLAMA) == "LlamaForCausalLM"


QWEN2_WINDOWS = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({**QWEN2_WINDOWS, "max_window_layers": 3}, (16, (0, 1, 2))),
        ({**QWEN2_WINDOWS}, (16, (0, 1, 2, 3))),  # transformers' max_window_layers is 28
        ({**QWEN2_WINDOWS, "layer_types": ["full_attention", *["sliding_attention"] * 3]}, (16, (0,))),
        ({**QWEN2_WINDOWS, "use_sliding_window": False, "max_window_layers": 3}, (None, ())),
        ({"sliding_window": 16}, (None, ())),  # a Llama has none, whatever is written
        ({"architectures": ["MistralForCausalLM"]}, (4096, ())),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None, ())),
    ],
)
def test_windows_are_those_that_transformers_takes(settings: dict[str, Any], windows: Any) -> None:
    model = model_config_from_hf(config_json(**settings))
    assert (model.sliding_window, model.global_layers) == windows


def config_json(**changes: Any) -> dict[str, Any]:
    return hf_config(LLAMA, "LlamaForCausalLM") | changes


def test_rotary_settings_of_transformers_5_are_read() -> None:
    settings = config_json(rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5}, max_position_embeddings=131072)
    del settings["rope_theta"], settings["rope_scaling"]
    model = model_config_from_hf(settings)
    assert (model.rotary_base, model.rope_scaling) == (5e5, RopeScaling(**LLAMA3_ROPE))
    settings["rope_parameters"]["partial_rotary_factor"] = 0.5
    with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0\.5"):
        model_config_from_hf(settings)


PHI3_JSON = {"architectures": ["Phi3ForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not supported; expected one of: LlamaForC"),
        ({"architectures": ["Llama"]}, "architecture 'Llama' is not supported"),
        ({"architectures": None}, "architecture '(none)' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' in config.json is not supported; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type = 'ntk' in config.json is not supported; expec"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"factor": 2.0}}, "factor = 2.0 in config.json is not supported"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4}}, "low_freq_factor = 4: expected less than high_freq"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}},
            "beyond original_max_position_embeddings = 32 would change the positions of their whole batch",
        ),
        ({**PHI3_JSON, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope_type = 'longrope'"),
        ({**PHI3_JSON, "partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75"),
        ({**PHI3_JSON, "head_dim": 8}, "Phi3ForCausalLM cannot have model.head_dim = 8"),
        ({**QWEN2_WINDOWS, "layer_types": ["chunked_attention"] * 4}, "layer_types = ['chunked_attention'"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "config.json of Gemma2ForCausalLM lacks query_pre_attn_scalar"),
        ({"vocab_size": None, "rms_norm_eps": None}, "config.json of LlamaForCausalLM lacks vocab_size, rms_norm_eps"),
        ({"intermediate_size": 0}, "ffn_hidden_size = 0"),
    ],
)
def test_what_would_be_computed_differently_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        model_config_from_hf(config_json(**change))


@pytest.mark.parametrize(
    ("architecture", "model", "said"),
    [
        ("GPT2LMHeadModel", LLAMA, "'GPT2LMHeadModel' is not supported"),
        ("Qwen3ForCausalLM", LLAMA, "needs model.qk_norm = True, the model has False"),
        ("LlamaForCausalLM", FAMILIES["Qwen2ForCausalLM"], "needs model.qkv_bias = False, the model has True"),
        ("Qwen2ForCausalLM", LLAMA.model_copy(update={"qkv_bias": True, "head_dim": 8}), "model.head_dim = 8"),
        ("LlamaForCausalLM", FAMILIES["MistralForCausalLM"], "cannot have model.sliding_window = 9"),
        ("Gemma2ForCausalLM", LLAMA, "needs model.activation = gelu_tanh, the model has silu"),
    ],
)
def test_architecture_without_a_feature_of_the_model_is_refused(
    architecture: str, model: ModelConfig, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        hf_config(model, architecture)
