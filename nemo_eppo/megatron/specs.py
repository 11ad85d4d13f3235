"""The layer spec: which module does what in a decoder layer, on this rank's device."""

import importlib.util
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import device
from nemo_eppo.megatron.attention import CoreAttention
from nemo_eppo.megatron.norms import NormAndAdd, RMSNorm
from nemo_eppo.models.numerics import ACTIVATIONS, DTYPES
from nemo_eppo.settings.model import ModelConfig, ParallelConfig, Precision

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Names of a layer's norm weights in TransformerEngine's modules, which fuse each norm into the next projection, and in
other modules."""


def has_transformer_engine() -> bool:
    """Tell whether TransformerEngine's modules are used: it is installed and this process computes on a GPU."""
    return device.on_gpu() and _installed("transformer_engine")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, recompute: bool = False
) -> TransformerConfig:
    """Return Megatron's description of the model; `recompute` drops the activations of layers and recomputes them.

    Raises:
        ConfigError: TransformerEngine, which this process would use, lacks a feature of the model.
    """
    gpu = device.on_gpu()
    if has_transformer_engine() and model.attention_softcap is not None:
        raise ConfigError(
            f"model.attention_softcap = {model.attention_softcap}: TransformerEngine's attention cannot cap logits; "
            "expected null on a machine that has it"
        )
    pipelined = parallel.pipeline_model_parallel_size > 1
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_width,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.norm_plus_one,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[model.activation],
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        softmax_scale=model.attention_scale,
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),
        window_attn_skip_freq=[int(layer not in model.global_layers) for layer in range(model.num_layers)],
        init_method_std=model.init_std,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        variable_seq_lengths=False,  # else stages exchange shapes, and wait for the device, before every tensor
        # interleaving with batched sends gives wrong losses without an error (megatron-core 0.16, gloo)
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=pipelined and not interleaved,
        batch_p2p_sync=False,
        use_cpu_initialization=not gpu,
        attention_backend=AttnBackend.auto if has_transformer_engine() else AttnBackend.local,
        # Megatron's own linears, of which the output projection is one, refuse it without APEX
        gradient_accumulation_fusion=has_transformer_engine() and _installed("fused_weight_gradient_mlp_cuda"),
        bias_activation_fusion=model.activation == "silu",
        bias_dropout_fusion=gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=has_transformer_engine(),
        persist_layer_norm=gpu,
        **(
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
            if recompute
            else {}
        ),
    )


def decoder_spec(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Choose the modules of this rank's (virtual) pipeline stage: TransformerEngine's if it is used, else torch's."""
    if has_transformer_engine():
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
        attention = layer.submodules.self_attention.submodules
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention.core_attention = partial(CoreAttention, softcap=model.attention_softcap)
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if model.post_norms:
        add = ModuleSpec(module=NormAndAdd, params={"config": config})
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = add
    if has_transformer_engine():
        return layer
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
