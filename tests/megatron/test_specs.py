"""What this machine's modules cannot compute is refused by name."""

import math
from types import SimpleNamespace

import pytest
from features import GEMMA2, MISTRAL, YARN
from tiny import MODEL

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import specs
from nemo_eppo.settings.model import ParallelConfig


def test_transformer_engine_is_not_asked_to_cap_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: True)  # which no CPU has
    with pytest.raises(ConfigError, match=r"model\.attention_softcap = 2\.0: TransformerEngine's attention cannot cap"):
        specs.transformer_config(MODEL.model_copy(update=GEMMA2), ParallelConfig(), "fp32")


def test_features_are_told_to_megatron_in_its_own_words() -> None:
    config = specs.transformer_config(MODEL.model_copy(update=GEMMA2), ParallelConfig(), "fp32")
    assert (config.window_size, config.window_attn_skip_freq) == ((3, 0), [1, 0, 1, 0])
    assert config.softmax_scale == 20**-0.5
    assert config.layernorm_zero_centered_gamma
    mistral = specs.transformer_config(MODEL.model_copy(update=MISTRAL), ParallelConfig(), "fp32")
    assert (mistral.window_size, mistral.window_attn_skip_freq) == ((2, 0), [1, 1, 1, 1])
    llama = specs.transformer_config(MODEL, ParallelConfig(), "fp32")
    assert (llama.window_size, llama.softmax_scale, llama.layernorm_zero_centered_gamma) == (None, 8**-0.5, False)
    yarn = specs.transformer_config(MODEL.model_copy(update={"rope_scaling": YARN}), ParallelConfig(), "fp32")
    assert yarn.softmax_scale == pytest.approx(8**-0.5 * (1 + 0.1 * math.log(4)) ** 2)


@pytest.mark.parametrize("has_te", [False, True])
@pytest.mark.parametrize("installed", ["fused_weight_gradient_mlp_cuda", "another"])
def test_weight_gradients_are_fused_where_transformer_engine_and_apex_are(
    monkeypatch: pytest.MonkeyPatch, has_te: bool, installed: str
) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: has_te)
    monkeypatch.setattr(specs, "_installed", lambda name: name == installed)
    monkeypatch.setattr(specs, "TransformerConfig", SimpleNamespace)  # Megatron's asks for TransformerEngine itself
    config = specs.transformer_config(MODEL, ParallelConfig(), "fp32")
    assert config.gradient_accumulation_fusion == (has_te and installed != "another")
