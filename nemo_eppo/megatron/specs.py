"""The layer spec: which module does what in a decoder layer, on this rank's device."""

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_eppo.megatron import device
from nemo_eppo.models.layout import ParallelConfig
from nemo_eppo.models.model_config import DTYPES, ModelConfig, Precision


def has_transformer_engine() -> bool:
    """TransformerEngine is used where it is installed and there is a GPU to run it on."""
    return device.on_gpu() and importlib.util.find_spec("transformer_engine") is not None


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over the sequence-parallel ranks (megatron-core's own refuses that)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPACoreAttention(nn.Module):
    """Core attention through torch's fused scaled_dot_product_attention; in a mask, True means hidden."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, heads, width], key and value [s, b, groups, width] -> [s, b, heads * width].

        Packed rows come as [tokens, heads, width], and leave as [tokens, heads * width].
        """
        if attention_bias is not None:
            raise NotImplementedError("this core attention takes no attention bias")
        if packed_seq_params is not None:
            sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
            parts = [t.unsqueeze(1).split(sizes) for t in (query, key, value)]
            return torch.cat([self._attend(q, k, v, None) for q, k, v in zip(*parts, strict=True)]).squeeze(1)
        return self._attend(query, key, value, attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if attention_mask is None else ~attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attention_mask is None,
            scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, recompute: bool = False
) -> TransformerConfig:
    """Megatron's description of the model. `recompute` drops activations of every layer and recomputes them."""
    gpu = device.on_gpu()
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
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
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
        # micro-batches are cut to their own longest sequence, so pipeline stages tell each other the shape
        variable_seq_lengths=pipelined,
        moe_token_dispatcher_type="alltoall",
        # interleaving with batched sends gives wrong losses without an error (megatron-core 0.16, gloo)
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=pipelined and not interleaved,
        batch_p2p_sync=False,
        use_cpu_initialization=not gpu,
        attention_backend=AttnBackend.auto if has_transformer_engine() else AttnBackend.local,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=gpu,
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


def decoder_spec(config: TransformerConfig, vp_stage: int | None) -> Any:
    """Modules of this rank's (virtual) pipeline stage: TransformerEngine's where there is one, else torch's own."""
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    modules, attention = layer.submodules, layer.submodules.self_attention.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
