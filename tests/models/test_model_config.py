"""A model or layout that cannot work is refused before anything is built, with the field and its value."""

import re
from typing import Any

import pytest
from tiny import MODEL

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.models.layout import check_layout
from nemo_eppo.settings.model import ModelConfig, ParallelConfig


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"tensor_model_parallel_size": 8}, "policy.num_attention_heads = 4 is not divisible by .* = 8"),
        ({"tensor_model_parallel_size": 4}, "policy.num_query_groups = 2 is not divisible by .* = 4"),
        ({"tensor_model_parallel_size": 32}, "policy.ffn_hidden_size = 48 is not divisible by .* = 32"),
        ({"pipeline_model_parallel_size": 3}, "policy.num_layers = 4 is not divisible by pipeline .* = 3"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            "policy.num_layers = 4 is not divisible by pipeline .* = 8",
        ),
    ],
)
def test_layout_that_does_not_divide_the_model_is_refused(layout: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_layout(MODEL, ParallelConfig(**layout), where="policy")


def test_all_that_does_not_divide_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_layout(MODEL, ParallelConfig(tensor_model_parallel_size=5, pipeline_model_parallel_size=3))
    fields = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "num_layers")
    assert [field in str(error.value) for field in fields] == [True] * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "Gemma"}, "'GemmaForCausalLM' is not supported; expected one of: LlamaForCausalLM, .*Phi3ForSeq"),
        ({"family": "Qwen3"}, "Qwen3 needs model.qk_norm = True, the model has False"),
        ({"qk_norm": True, "qkv_bias": True}, "no supported family has all features(.|\n)*Qwen3 needs model.qkv_bias"),
    ],
)
def test_model_of_no_family_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_layout(MODEL.model_copy(update=change), ParallelConfig())


def test_possible_layouts_are_accepted() -> None:
    for layout in ({}, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}):
        check_layout(MODEL, ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by num_attention_heads 4"),
        ({"num_query_groups": 3}, "num_attention_heads 4 is not divisible by num_query_groups 3"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"num_layers": 0}, "num_layers = 0: .*greater than or equal to 1"),
        ({"global_layers": [1]}, r"global_layers = \[1\] needs a sliding_window"),
        ({"sliding_window": 8, "global_layers": [0, 4]}, r"global_layers: \[4\] are no layers; expected 0 to 3"),
        ({"sliding_window": 0}, "sliding_window = 0: .*greater than or equal to 1"),
        ({"activation": "gelu"}, "activation = 'gelu'"),
        ({"norm_epsilon": 0.0}, "norm_epsilon = 0.0: .*greater than 0"),
        ({"qk_norms": True}, "qk_norms: unknown key .*did you mean 'qk_norm'"),
    ],
)
def test_impossible_model_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(ModelConfig, MODEL.model_dump() | change)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"context_parallel_size": 2}, "context_parallel_size: unknown key"),
        ({"sequence_parallel": True}, "sequence_parallel = true needs tensor_model_parallel_size > 1"),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1",
        ),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size = 0: .*greater than or equal to 1"),
    ],
)
def test_impossible_parallelism_is_refused(layout: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(ParallelConfig, layout)


def test_ranks_that_the_layout_cannot_use_are_refused() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert layout.data_parallel_size(8) == 2
    with pytest.raises(ConfigError, match=re.escape("world size 6 is not divisible by tensor_model_parallel_size 2 x")):
        layout.data_parallel_size(6)
    with pytest.raises(ConfigError, match="global_batch_size = 3 is not divisible by 2 replicas"):
        layout.check_update("global_batch_size", 3, 8)
    interleaved = layout.model_copy(update={"virtual_pipeline_model_parallel_size": 2})
    interleaved.check_update("global_batch_size", 4, 8)
    with pytest.raises(ConfigError, match="global_batch_size = 2: expected at least 4"):
        interleaved.check_update("global_batch_size", 2, 8)


def test_vocabulary_is_padded_to_equal_shards() -> None:
    assert [MODEL.padded_vocab_size(tp) for tp in (1, 2, 4, 8)] == [104, 112, 128, 128]
