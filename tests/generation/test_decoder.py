"""What the decoder computes against the model itself, the trainer's scorer and transformers, on the same weights."""

from functools import cache
from typing import Any, get_args

import pytest
import torch
from distributed import run_ranks
from features import LLAMA3
from small_models import (
    END,
    EOS,
    GEMMA2_MODEL,
    LAYOUTS,
    MISTRAL_MODEL,
    MODEL,
    PAD,
    PHI3_MODEL,
    QWEN2,
    QWEN3,
    build_engine,
    build_policy,
    greedy_without_cache,
    hf_tokenizer,
    random_prompts,
    random_weights,
    tokens_of,
    trainer_reads,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_eppo.generation import decoder, layers
from nemo_eppo.megatron import device
from nemo_eppo.megatron.attention import attend
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.models.hf_config import hf_config
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.energy import EnergyProbeConfig, Preset
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig

SAMPLINGS = {
    "plain": SamplingParams(max_new_tokens=12),
    "temperature": SamplingParams(max_new_tokens=12, temperature=0.7),
    "top-k": SamplingParams(max_new_tokens=12, top_k=5),
    "top-p": SamplingParams(max_new_tokens=12, temperature=1.3, top_p=0.8),
    "top-k and top-p": SamplingParams(max_new_tokens=12, temperature=1.5, top_k=9, top_p=0.9),
    "greedy": SamplingParams(max_new_tokens=12, greedy=True),
    "penalty": SamplingParams(max_new_tokens=12, temperature=1.3, top_p=0.9, repetition_penalty=1.5),
    "shortest": SamplingParams(max_new_tokens=12, temperature=4.0, min_new_tokens=7, stop_strings=("<end>",)),
    "stop strings": SamplingParams(max_new_tokens=12, temperature=2.0, stop_strings=("<end>", "ab", "ob", "u")),
    "greedy, penalised": SamplingParams(max_new_tokens=12, greedy=True, repetition_penalty=1.5),
    "greedy, all": SamplingParams(
        max_new_tokens=24, greedy=True, repetition_penalty=1.3, min_new_tokens=9, stop_strings=("<end>", "ka", "ok")
    ),
}
OF_ALL_FAMILIES = ("greedy", "top-p", "greedy, penalised", "greedy, all", "penalty")
MODELS = {
    "Llama": ("LlamaForCausalLM", MODEL),
    "Llama 3.1": ("LlamaForCausalLM", MODEL.model_copy(update={"rope_scaling": LLAMA3})),
    "Qwen2": ("Qwen2ForCausalLM", QWEN2),
    "Qwen3": ("Qwen3ForCausalLM", QWEN3),
    "Gemma2": ("Gemma2ForCausalLM", GEMMA2_MODEL),
    "Phi3": ("Phi3ForCausalLM", PHI3_MODEL),
    "Mistral": ("MistralForCausalLM", MISTRAL_MODEL),
}
FAMILY_LAYOUTS = [
    ("Llama", "one rank"),
    ("Llama 3.1", "one rank"),
    ("Qwen2", "TP 2"),
    ("Qwen3", "TP 2 PP 2"),
    ("Gemma2", "TP 2 PP 2"),
    ("Phi3", "PP 2"),
    ("Mistral", "TP 2 PP 2"),
]
OWN_LAYOUTS = [name for name in LAYOUTS if name != "TP 2"]  # of MODEL: SP 2, TP 2 PP 2 and Qwen2 show TP 2
PROMPTS = random_prompts([7, 1, 4, 12, 4])
ENERGY = EnergyProbeConfig(preset="mlp_linears", layers=(-1, 0))


def ranks(layout: str) -> int:
    settings = LAYOUTS[layout]
    return settings.get("tensor_model_parallel_size", 1) * settings.get("pipeline_model_parallel_size", 1)


def decode(layout: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Everything the tests below look at, computed in one process group."""
    chunks = build_policy(layout, model)
    # the other prompts join as responses end
    engine = build_engine(chunks, model, ENERGY, max_batch_size=3)
    probe = EnergyProbe(ENERGY, chunks, model.num_layers)
    found: dict[str, Any] = {}
    if model == MODEL:  # the other families are compared with transformers
        found["whole passes"] = [greedy_without_cache(chunks, model, prompt, 12) for prompt in PROMPTS[:3]]
    for name in SAMPLINGS if model == MODEL else OF_ALL_FAMILIES:
        sampling = SAMPLINGS[name]
        completions = engine.generate(PROMPTS, sampling, list(range(len(PROMPTS))))
        found[name] = (completions, trainer_reads(chunks, PROMPTS, completions, sampling, probe=probe))
        if name in ("penalty", "shortest"):
            packed = trainer_reads(chunks, PROMPTS, completions, sampling, 60, probe)
            found[f"{name}, packed"] = (completions, packed)
    return found


def decoded(layout: str, model: ModelConfig = MODEL) -> list[dict[str, Any]]:
    return _decoded(layout, model)


@cache  # which tells a default from the same value that is given
def _decoded(layout: str, model: ModelConfig) -> list[dict[str, Any]]:
    return run_ranks(decode, ranks(layout), LAYOUTS[layout], model)


def up_to_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_greedy_with_a_cache_is_greedy_by_whole_forward_passes(layout: str) -> None:
    for rank in decoded(layout):
        expected = [up_to_eos(tokens) for tokens in rank["whole passes"]]
        assert [completion.token_ids for completion in rank["greedy"][0][: len(expected)]] == expected


@pytest.mark.parametrize("sampling", [*SAMPLINGS, "penalty, packed", "shortest, packed"])
@pytest.mark.parametrize("layout", OWN_LAYOUTS)
def test_what_is_read_is_what_the_trainer_computes(layout: str, sampling: str) -> None:
    completions, expected = decoded(layout)[0][sampling]
    for completion, (logprobs, entropies, energies) in zip(completions, expected, strict=True):
        assert len(completion.logprobs) == len(completion.token_ids)
        torch.testing.assert_close(completion.logprobs, logprobs, atol=1e-5, rtol=1e-6)  # processors round otherwise
        torch.testing.assert_close(completion.entropies, entropies, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(completion.energies, energies, atol=1e-5, rtol=0)


def read_all_presets(layout: dict[str, Any]) -> list[tuple[list[Tensor | None], list[Tensor]]]:
    """For each preset, energies that the engine read and those that the trainer computes."""
    chunks, sampling = build_policy(layout, GEMMA2_MODEL), SAMPLINGS["stop strings"]
    found = []
    for preset in get_args(Preset):
        config = EnergyProbeConfig(preset=preset, layers=(-1, 0), norm=preset != "down_proj")
        engine = build_engine(chunks, GEMMA2_MODEL, config, max_batch_size=3)
        completions = engine.generate(PROMPTS, sampling, list(range(len(PROMPTS))))
        probe = EnergyProbe(config, chunks, GEMMA2_MODEL.num_layers)
        reads = trainer_reads(chunks, PROMPTS, completions, sampling, probe=probe)
        found.append(([completion.energies for completion in completions], [energies for *_, energies in reads]))
    return found


def test_energies_of_all_presets_are_the_trainers() -> None:
    for found, expected in run_ranks(read_all_presets, 4, LAYOUTS["TP 2 PP 2"])[0]:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("layout", [name for name in OWN_LAYOUTS if name != "one rank"])
def test_every_rank_of_every_layout_decodes_the_same(layout: str, sampling: str) -> None:
    expected: list[Completion] = decoded("one rank")[0][sampling][0]
    for rank in decoded(layout):
        completions = rank[sampling][0]
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
        for completion, other in zip(completions, expected, strict=True):
            torch.testing.assert_close(completion.logprobs, other.logprobs, atol=1e-5, rtol=0)
            torch.testing.assert_close(completion.energies, other.energies, atol=1e-5, rtol=0)


@cache
@torch.no_grad()
def transformers_greedy(name: str, sampling_name: str) -> list[tuple[list[int], Tensor]]:
    """Tokens of each response, and their log-probs."""
    (architecture, model), sampling = MODELS[name], SAMPLINGS[sampling_name]
    config = AutoConfig.for_model(**hf_config(model, architecture) | {"pad_token_id": PAD})
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    network.load_state_dict(random_weights(model), strict=not model.tie_embeddings)
    network.tie_weights()
    responses = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        output = network.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            stop_strings=[text for text in sampling.stop_strings if text != "<end>"] or None,
            tokenizer=hf_tokenizer(),
            eos_token_id=[EOS, END] if "<end>" in sampling.stop_strings else EOS,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
        response, scores = output.sequences[0, len(prompt) :], torch.cat(output.scores)
        responses.append((response.tolist(), scores.log_softmax(-1).gather(-1, response[:, None])[:, 0]))
    return responses


@pytest.mark.parametrize(
    "sampling", ["greedy", pytest.param("greedy, penalised", marks=pytest.mark.slow), "greedy, all"]
)
@pytest.mark.parametrize(("name", "layout"), FAMILY_LAYOUTS)
def test_greedy_is_that_of_transformers_far_past_the_window(name: str, layout: str, sampling: str) -> None:
    _, model = MODELS[name]
    assert max(len(prompt) for prompt in PROMPTS) > 2 * (model.sliding_window or 0)
    greedy = decoded(layout, model)[0][sampling][0]
    expected = transformers_greedy(name, sampling)
    for completion, (tokens, logprobs) in zip(greedy, expected, strict=True):
        assert completion.token_ids == tokens
        torch.testing.assert_close(completion.logprobs, logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling", ["top-p", "penalty"])
@pytest.mark.parametrize(("name", "layout"), FAMILY_LAYOUTS)
def test_logprobs_of_all_families_are_the_trainers(name: str, layout: str, sampling: str) -> None:
    completions, expected = decoded(layout, MODELS[name][1])[0][sampling]
    for completion, (logprobs, *_) in zip(completions, expected, strict=True):
        torch.testing.assert_close(completion.logprobs, logprobs, atol=1e-5, rtol=0)


def decode_in_small_prefills(limit: int) -> list[Completion]:
    decoder._PREFILL_TOKENS = limit
    return build_engine(build_policy({})).generate(PROMPTS, SAMPLINGS["plain"], list(range(len(PROMPTS))))


def test_prompts_may_be_prefilled_in_parts() -> None:
    expected = decoded("one rank")[0]["plain"][0]
    for limit in (1, 24):
        completions = run_ranks(decode_in_small_prefills, 1, limit)[0]
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]


def decode_as_on_a_gpu(model: ModelConfig) -> tuple[list[Completion], list[Any]]:
    """Responses from a cache that grows by 16 columns; and of each masked call of attention: the dtypes of query and
    mask, the mask's width, and whether cuDNN's kernel might have been used."""
    masked: list[Any] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None, **settings: Any) -> Tensor:
        if visible is not None:
            masked.append((query.dtype, visible.dtype, visible.size(-1), torch._C._get_cudnn_sdp_enabled()))
        return attend(query, key, value, visible, **settings)

    vars(decoder)["attend"] = watched
    device.cached_tokens_multiple = lambda: 16
    seeds = list(range(len(PROMPTS)))
    build_engine(build_policy({}, model, precision="bf16"), model).generate(PROMPTS, SAMPLINGS["greedy"], seeds)
    found = build_engine(build_policy({}, model), model, max_batch_size=3).generate(PROMPTS, SAMPLINGS["greedy"], seeds)
    return found, masked


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_masks_are_as_gpu_kernels_want_them_and_change_no_response(name: str) -> None:
    found, masked = run_ranks(decode_as_on_a_gpu, 1, MODELS[name][1])[0]
    assert tokens_of(found) == [tokens for tokens, _ in transformers_greedy(name, "greedy")]
    assert {query for query, *_ in masked} == {torch.float32, torch.bfloat16}
    assert all(query == mask and width % 16 == 0 and not cudnn for query, mask, width, cudnn in masked)


def decode_bf16(model: ModelConfig) -> tuple[list[Completion], list[tuple[Tensor, Tensor, Tensor]]]:
    chunks, sampling = build_policy({}, model, precision="bf16"), SAMPLINGS["temperature"]
    completions = build_engine(chunks, model, ENERGY).generate(PROMPTS, sampling, list(range(len(PROMPTS))))
    probe = EnergyProbe(ENERGY, chunks, model.num_layers)
    return completions, trainer_reads(chunks, PROMPTS, completions, sampling, probe=probe)


@pytest.mark.parametrize("model", [MODEL, GEMMA2_MODEL], ids=["Llama", "Gemma2"])
def test_what_bf16_models_give_is_fp32_and_near_the_trainers(model: ModelConfig) -> None:
    completions, expected = run_ranks(decode_bf16, 1, model)[0]
    ours = [torch.cat([getattr(each, name) for each in completions]) for name in ("logprobs", "entropies", "energies")]
    for found, theirs in zip(ours, map(torch.cat, zip(*expected, strict=True)), strict=True):
        assert (found != found.bfloat16()).any()
        assert (found - theirs).abs().mean() < 0.02


def decode_with_fused_names() -> list[Completion]:
    chunks = build_policy({})
    for layer in unwrap(chunks[0]).decoder.layers:
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
        del layer.input_layernorm, layer.pre_mlp_layernorm
    return build_engine(chunks, max_batch_size=3).generate(PROMPTS, SAMPLINGS["greedy"], [0] * len(PROMPTS))


def test_norms_are_found_where_transformer_engine_keeps_them() -> None:
    assert tokens_of(run_ranks(decode_with_fused_names, 1)[0]) == tokens_of(decoded("one rank")[0]["greedy"][0])


def rotate_bf16(fused: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys [b, s, G, R + 1, D], and what the decoder makes of them."""
    chunks = build_policy({}, MODEL, precision="bf16")
    unwrap(chunks[0]).config.apply_rope_fusion = fused
    heads = torch.randn(3, 40, 2, 3, MODEL.head_width, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = heads.clone()
    layers.rotate(rotated, decoder.Decoder(chunks)._rotary_table(40)[:, None])
    return heads, rotated


@pytest.mark.parametrize("fused", [False, True])
def test_rotations_round_as_the_trainers_do(fused: bool) -> None:
    [(heads, found)] = run_ranks(rotate_bf16, 1, fused)
    dtype = torch.float64 if fused else torch.bfloat16  # TransformerEngine's kernel rounds its result alone
    half = MODEL.head_width // 2
    angles = torch.arange(40)[:, None] * MODEL.rotary_base ** -(torch.arange(half) / half).double()
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None, None].to(dtype) for f in (torch.cos, torch.sin))
    first, second = heads.to(dtype).chunk(2, -1)
    expected = heads.to(dtype) * cos + torch.cat([-second, first], -1) * sin
    assert (found != expected.bfloat16()).double().mean() < 0.002
