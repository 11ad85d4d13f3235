"""Frequencies and magnitudes are those that transformers computes from the same config.json; the rest is refused."""

import math
from typing import Any

import pytest
import torch
from tiny import MODEL
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.models.hf_config import hf_config, model_config_from_hf
from nemo_eppo.models.rope import inverse_frequencies
from nemo_eppo.settings.model import ModelConfig, RopeScaling

FACTORS: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
QWEN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: dict[str, tuple[float, int, dict[str, Any] | None]] = {
    "plain": (10000.0, 64, None),
    "default": (10000.0, 64, {"rope_type": "default"}),
    "linear": (10000.0, 128, {"rope_type": "linear", "factor": 2.5}),
    "linear, by its older key": (1e6, 16, {"type": "linear", "factor": 8}),
    "dynamic": (10000.0, 64, {"rope_type": "dynamic", "factor": 4.0}),
    "dynamic, of the whole length": (
        10000.0,
        64,
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    "Llama 3.1": (
        5e5,
        128,
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, **FACTORS},
    ),
    "Llama 3.2": (
        5e5,
        64,
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, **FACTORS},
    ),
    "llama3, of 1500 tokens": (
        10000.0,
        80,
        {
            "rope_type": "llama3",
            "factor": 3.0,
            "original_max_position_embeddings": 1500,
            "low_freq_factor": 0.5,
            "high_freq_factor": 20.0,
        },
    ),
    "Qwen 2.5": (1e6, 128, QWEN),
    "yarn, of the model's own length": (10000.0, 96, {"rope_type": "yarn", "factor": 2.0}),
    "yarn, with an attention factor": (10000.0, 64, QWEN | {"attention_factor": 0.8, "mscale": 2.0}),
    "yarn, with mscale": (10000.0, 64, QWEN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "yarn, with one mscale": (10000.0, 64, QWEN | {"mscale": 0.7, "mscale_all_dim": 0.0}),
    "yarn, between whole channels": (
        10000.0,
        64,
        QWEN | {"original_max_position_embeddings": 300, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    ),
    "yarn, a step": (10000.0, 64, QWEN | {"beta_fast": 3.0, "beta_slow": 3.0, "truncate": False}),
    "yarn, that shortens": (10000.0, 64, QWEN | {"factor": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_magnitude_are_those_of_transformers(case: str) -> None:
    base, width, scaling = CASES[case]
    source = hf_config(MODEL.model_copy(update={"head_dim": width, "max_sequence_length": 4096}), "LlamaForCausalLM")
    source |= {"rope_theta": base, "rope_scaling": scaling}
    model = model_config_from_hf(source)
    written = hf_config(model, "LlamaForCausalLM")
    for settings in (source, written):
        config = AutoConfig.for_model(**settings)
        kind = (config.rope_scaling or {}).get("rope_type", "default")
        expected, magnitude = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
        got = inverse_frequencies(model.head_width, model.rotary_base, model.rope_scaling)
        torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)
        assert model.attention_scale == pytest.approx(width**-0.5 * magnitude**2, rel=1e-12)
    plain, _ = ROPE_INIT_FUNCTIONS["default"](config, device="cpu")
    kept = expected == plain
    assert torch.equal(got[kept], plain[kept]), "unstretched frequencies, to the last bit"
    assert model_config_from_hf(written) == model


def test_frequencies_are_the_formulas() -> None:
    llama3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
    scaling = RopeScaling(rope_type="llama3", original_max_position_embeddings=100, **llama3)
    assert inverse_frequencies(8, 16.0, None).tolist() == [1.0, 0.5, 0.25, 0.125]
    turns = 100 * 0.125 / (2 * math.pi)  # 1.99 in 100 tokens: between 1 and 3
    kept = (turns - 1) / 2
    got = inverse_frequencies(8, 16.0, scaling).tolist()
    assert got[:3] == [1.0, 0.5, 0.25]  # 15.9, 8.0 and 3.98 turns
    assert got[3] == pytest.approx(0.125 * kept + 0.125 / 4 * (1 - kept), rel=1e-6)
    linear = RopeScaling(rope_type="linear", factor=2)
    assert inverse_frequencies(4, 100.0, linear).tolist() == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "ntk", "factor": 2}, "rope_scaling.rope_type = 'ntk'"),
        ({"rope_type": "linear"}, "rope_scaling.factor: required, but not set"),
        ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor = 0: .*greater than 0"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 1}, "rope_scaling: rope_type 'linear' has no beta_fast"),
        ({"rope_type": "linear", "factor": 2, "low_freq": 1}, "rope_scaling.low_freq: unknown key .*'low_freq_factor'"),
        ({"rope_type": "yarn", "factor": 2}, "rope_scaling: rope_type 'yarn' needs original_max_position_embeddings"),
        (
            {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 8},
            "rope_type 'llama3' needs high_freq_factor, low_freq_factor",
        ),
        (
            {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 8}
            | {"low_freq_factor": 4, "high_freq_factor": 4},
            "low_freq_factor = 4: expected less than high_freq_factor = 4",
        ),
        (
            {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 63},
            "'dynamic': tokens beyond original_max_position_embeddings = 63 would change .* up to that, not 64",
        ),
    ],
)
def test_impossible_scaling_is_refused(scaling: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(ModelConfig, MODEL.model_dump() | {"rope_scaling": scaling})
