"""What a model is: its architecture, head, adapters and numeric precision."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from nemo_eppo.config import Config

Head = Literal["lm", "scalar", "odin", "inform"]
LoRATarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ModelConfig(Config):
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    num_layers: int = Field(ge=1)
    """Decoder layers."""
    hidden_size: int = Field(ge=1)
    """Width H of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Width between the MLP's gate/up and down projections."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_query_groups: int | None = Field(None, ge=1)
    """Key/value heads; null for as many as query heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head; null for hidden_size / num_attention_heads."""
    vocab_size: int = Field(0, ge=0)
    """Tokens of the model, 0 for the tokenizer's; padding for tensor parallelism is added and masked internally."""
    max_sequence_length: int = Field(ge=2)
    """Longest prompt + response, in tokens."""
    rotary_base: float = Field(10000.0, gt=0)
    """Base of the rotary position embedding."""
    rope_scaling_factor: float | None = Field(None, gt=0)
    """Llama-3.1 style rotary scaling factor; null for none."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Epsilon inside RMSNorm."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys (Qwen3)."""
    tie_embeddings: bool = False
    """Share input embedding and output projection."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of freshly initialised weights."""

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
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
        tp = tensor_model_parallel_size
        return (self.vocab_size + tp - 1) // tp * tp


class LoRAConfig(Config):
    """Adapters to train in place of the model, whose own weights stay as they are; heads are trained in full."""

    rank: int = Field(16, ge=1)
    """Width of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: tuple[LoRATarget, ...] = Field(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), min_length=1)
    """Which linears of every layer get one: query, key and value; attention output; MLP gate and up; MLP down."""
