"""Settings of a model: architecture, head, adapters and numeric precision."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nemo_eppo.config import Config
from nemo_eppo.models.rope import RopeScaling, inverse_frequencies

Head = Literal["lm", "scalar", "odin", "inform"]
LoRATarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
Precision = Literal["fp32", "bf16"]
Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ModelConfig(Config):
    """A decoder with RMSNorm, rotary positions, grouped-query attention and a gated MLP; the defaults are Llama's."""

    family: str | None = None
    """Family of `families.py` that names the tensors, e.g. Phi3; null for the first that has the model's features."""
    num_layers: int = Field(ge=1)
    """Decoder layers."""
    hidden_size: int = Field(ge=1)
    """Width H of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Width between the MLP's gate/up and down projections."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_query_groups: int | None = Field(None, ge=1)
    """Key/value heads; null for the number of query heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head; null for hidden_size / num_attention_heads."""
    vocab_size: int = Field(0, ge=0)
    """Tokens of the model, 0 for the tokenizer's; padding for tensor parallelism is added and masked internally."""
    max_sequence_length: int = Field(ge=2)
    """Longest prompt + response, in tokens."""
    rotary_base: float = Field(10000.0, gt=1)
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """How rotary positions are stretched; null for not at all."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Number added to the mean square in RMSNorm."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys (Qwen3)."""
    tie_embeddings: bool = False
    """Share input embedding and output projection."""
    activation: Activation = "silu"
    """Activation of the MLP's gate; gelu_tanh is GELU in its tanh approximation (Gemma 2)."""
    norm_plus_one: bool = False
    """RMSNorms scale by 1 + their weight (Gemma 2)."""
    post_norms: bool = False
    """Also apply RMSNorm to the outputs of attention and MLP, before the residual stream (Gemma 2)."""
    scale_embedding: bool = False
    """Multiply token embeddings by the square root of hidden_size (Gemma 2)."""
    query_pre_attn_scalar: int | None = Field(None, ge=1)
    """Attention logits are divided by the square root of this; null for the width of a head."""
    attention_softcap: float | None = Field(None, gt=0)
    """Cap c of attention logits x, which become c * tanh(x / c) (Gemma 2); null for none."""
    logit_softcap: float | None = Field(None, gt=0)
    """The same for the logits of the next token, before temperature; null for none."""
    sliding_window: int | None = Field(None, ge=1)
    """Tokens that a token attends to, itself included; null for all up to itself."""
    global_layers: tuple[int, ...] = ()
    """Layers, counted from 0, to which sliding_window does not apply."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of freshly initialised weights."""

    @model_validator(mode="before")
    @classmethod
    def _with_older_key(cls, values: Any) -> Any:
        """Read `rope_scaling_factor`, which older checkpoints have in place of `rope_scaling`: Llama 3.1's factor."""
        if not isinstance(values, Mapping) or "rope_scaling_factor" not in values:
            return values
        factor = values["rope_scaling_factor"]
        constants = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        scaling = None if factor is None else {"rope_type": "llama3", "factor": factor, **constants}
        return {**{k: v for k, v in values.items() if k != "rope_scaling_factor"}, "rope_scaling": scaling}

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; set head_dim if that is meant"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim = {self.head_width} is odd; rotary positions turn channels in pairs")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups {self.kv_heads}"
            )
        if self.global_layers and self.sliding_window is None:
            raise ValueError(f"global_layers = {list(self.global_layers)} needs a sliding_window")
        if unknown := [layer for layer in self.global_layers if not 0 <= layer < self.num_layers]:
            raise ValueError(f"global_layers: {unknown} are no layers; expected 0 to {self.num_layers - 1}")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic":
            original, longest = self.rope_scaling.original_max_position_embeddings, self.max_sequence_length
            if original is not None and original < longest:
                raise ValueError(
                    f"rope_scaling.rope_type = 'dynamic': tokens beyond original_max_position_embeddings = {original} "
                    "would change the positions of their whole batch; expected max_sequence_length "
                    f"(max_position_embeddings in config.json) up to that, not {longest}"
                )
        return self

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head, in channels."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_scale(self) -> float:
        """Factor of attention logits. It includes what YaRN multiplies queries and keys by."""
        magnitude = self.rope_scaling.magnitude if self.rope_scaling else 1.0
        return float((self.query_pre_attn_scalar or self.head_width) ** -0.5 * magnitude**2)

    def inverse_frequencies(self) -> Tensor:
        """Return the angle [head_width / 2], fp32, in radians, by which channels turn from token to token."""
        return inverse_frequencies(self.head_width, self.rotary_base, self.rope_scaling)

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the vocabulary size, rounded up so that tensor-parallel ranks hold equal numbers of rows."""
        tp = tensor_model_parallel_size
        return (self.vocab_size + tp - 1) // tp * tp


class LoRAConfig(Config):
    """Adapters to train instead of the model, whose own weights do not change; heads are trained in full."""

    rank: int = Field(16, ge=1)
    """Rank r of the adapters' matrices A [r, in] and B [out, r]."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: tuple[LoRATarget, ...] = Field(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), min_length=1)
    """Linears of every layer that get an adapter: query, key and value; attention output; MLP gate and up; down."""
