"""Settings of a model: architecture, head, adapters, numeric precision, layout."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.machine import visible_gpus

NULL: Any = None
"""Default of a setting that is never null once it is checked."""


def by_device(on_gpus: Any, on_cpus: Any) -> BeforeValidator:
    """Replace null by one of these defaults; see `load_config` for how the device is known."""

    def choose(value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        gpus = (info.context or {}).get("gpus")
        return on_gpus if (bool(visible_gpus()) if gpus is None else gpus) else on_cpus

    return BeforeValidator(choose)


RopeType = Literal["linear", "dynamic", "yarn", "llama3"]


_SETTINGS: dict[RopeType, tuple[set[str], set[str]]] = {
    "linear": (set(), set()),
    "dynamic": (set(), {"original_max_position_embeddings"}),
    "yarn": (
        {"original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"},
    ),
    "llama3": ({"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set()),
}
"""Settings beside `factor` that each kind needs, and those that it may have."""


class RopeScaling(Config):
    """How rotary positions are stretched over longer sequences than a model first learnt; config.json's own keys."""

    rope_type: RopeType
    """linear divides all frequencies by factor; llama3 and yarn only the low ones, which turn less than about once in
    original_max_position_embeddings tokens. dynamic changes none up to the model's longest sequence."""
    factor: float = Field(gt=0)
    """How many times longer sequences may be."""
    original_max_position_embeddings: int | None = Field(None, ge=1)
    """Longest sequence, in tokens, before it was stretched (llama3, yarn)."""
    low_freq_factor: float | None = Field(None, gt=0)
    """Channels that turn fewer times in the original length are stretched by factor (llama3)."""
    high_freq_factor: float | None = Field(None, gt=0)
    """Channels that turn more often in the original length stay as they are (llama3)."""
    beta_fast: float | None = Field(None, gt=0)
    """The same as high_freq_factor, for yarn; null for 32."""
    beta_slow: float | None = Field(None, gt=0)
    """The same as low_freq_factor, for yarn; null for 1."""
    truncate: bool | None = None
    """Round the channels that beta_fast and beta_slow give outwards to whole ones (yarn); null for true."""
    attention_factor: float | None = Field(None, gt=0)
    """Factor of queries and of keys (yarn); null for 1 + ln(factor) / 10, or for what both mscale give."""
    mscale: float | None = Field(None, ge=0)
    """With mscale_all_dim: weight of ln(factor) / 10 in the numerator of attention_factor (yarn)."""
    mscale_all_dim: float | None = Field(None, ge=0)
    """The same for the denominator."""

    @model_validator(mode="after")
    def _consistent(self) -> "RopeScaling":
        needed, allowed = _SETTINGS[self.rope_type]
        given = {name for name, value in self if value is not None} - {"rope_type", "factor"}
        if missing := sorted(needed - given):
            raise ValueError(f"rope_type {self.rope_type!r} needs {', '.join(missing)}")
        if unknown := sorted(given - needed - allowed):
            raise ValueError(f"rope_type {self.rope_type!r} has no {', '.join(unknown)}")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor = {self.low_freq_factor:g}: expected less than high_freq_factor = "
                f"{self.high_freq_factor:g}"
            )
        return self

    @property
    def magnitude(self) -> float:
        """Factor of queries and keys after they are turned (YaRN, arXiv 2309.00071, section 3.4)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(max(self.factor, 1))
        if self.mscale and self.mscale_all_dim:
            return (growth * self.mscale + 1) / (growth * self.mscale_all_dim + 1)
        return growth + 1


Head = Literal["lm", "scalar", "odin", "inform"]


LoRATarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


Precision = Literal["fp32", "bf16"]


Activation = Literal["silu", "gelu_tanh"]


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

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the vocabulary size, rounded up so that tensor-parallel ranks hold equal numbers of rows, multiples of
        8: GPUs multiply bf16 matrices much slower where rows do not start at multiples of 16 bytes."""
        multiple = 8 * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


class LoRAConfig(Config):
    """Adapters to train instead of the model, whose own weights do not change; heads are trained in full."""

    rank: int = Field(16, ge=1)
    """Rank r of the adapters' matrices A [r, in] and B [out, r]."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: tuple[LoRATarget, ...] = Field(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), min_length=1)
    """Linears of every layer that get an adapter: query, key and value; attention output; MLP gate and up; down."""


class ParallelConfig(Config):
    """How one job's model is laid out; data parallelism takes the rest of the world size."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share every weight matrix."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline rank (interleaved schedule); null for one."""
    sequence_parallel: bool = False
    """Also split activations outside attention and MLP over the tensor-parallel ranks."""

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel = true needs tensor_model_parallel_size > 1")
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        return self

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Return the replicas of the model in a job of `world_size` ranks; ConfigError if they do not fill it."""
        if world_size % self.model_parallel_size:
            raise ConfigError(
                f"world size {world_size} is not divisible by tensor_model_parallel_size "
                f"{self.tensor_model_parallel_size} x pipeline_model_parallel_size {self.pipeline_model_parallel_size}"
            )
        return world_size // self.model_parallel_size

    def check_update(self, name: str, rows: int, world_size: int) -> None:
        """Raise ConfigError if `rows` per update, the setting `name`, cannot fill all replicas and stages equally."""
        replicas, stages = self.data_parallel_size(world_size), self.pipeline_model_parallel_size
        if rows % replicas:
            raise ConfigError(f"{name} = {rows} is not divisible by {replicas} replicas")
        if self.virtual_pipeline_model_parallel_size and rows // replicas < stages:
            raise ConfigError(
                f"{name} = {rows}: expected at least {replicas * stages}, so that every replica has a row for each of "
                f"{stages} interleaved stages"
            )


class ModelSetup(Config):
    """Which model a job runs, and how it is laid out."""

    restore_from_path: Path | None = None
    """Checkpoint to start from, or a directory of checkpoints `step_*`, whose newest is taken; or a Hugging Face
    directory (config.json, tokenizer, safetensors) of a family in nemo_eppo/models/families.py."""
    architecture: ModelConfig | None = None
    """Architecture of a model with fresh weights instead; without vocab_size it takes the tokenizer's."""
    tokenizer: Path | None = None
    """Hugging Face tokenizer directory; null for the one that comes with the model."""
    allow_other_tokenizer: bool = False
    """Allow a tokenizer with other token ids than the one that comes with the model."""
    precision: Annotated[Precision, by_device("bf16", "fp32")] = NULL
    """Precision of weights and activations, null for bf16 on GPUs and fp32 on CPUs; heads, optimizer and losses are
    always fp32. fp32 is not TF32 on a GPU, unless the environment has NVIDIA_TF32_OVERRIDE=1."""
    recompute: bool = False
    """Recompute activations in the backward pass, which takes less memory and a third more time."""
    lora: LoRAConfig | None = None
    """Train adapters beside the model's frozen weights; null to train all of them."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is laid out over the job's ranks."""
    micro_batch_size: int = Field(4, ge=1)
    """Rows (preference pairs for a reward model) per forward pass of one replica, padded to the longest of them; with
    pipeline parallelism, to the longest of all passes."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens per forward pass with sequence packing, which joins rows without padding and balances
    them over micro-batches and replicas; a longer row gets its own pass. Replaces micro_batch_size; null pads
    instead."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSetup":
        if (self.restore_from_path is None) == (self.architecture is None):
            raise ValueError("exactly one of restore_from_path and architecture has to be set")
        if self.architecture is not None and self.tokenizer is None:
            raise ValueError("tokenizer has to be set for a model with a fresh architecture")
        if self.architecture is not None and self.lora is not None:
            raise ValueError(
                "lora trains adapters beside given weights, which needs restore_from_path, not a fresh architecture"
            )
        return self

    def beside(self, restore_from_path: Path, lora: LoRAConfig | None = None) -> "ModelSetup":
        """Describe another model that runs on the same ranks, with this one's layout, precision and micro-batches."""
        its_own = {"restore_from_path": restore_from_path, "lora": lora, "architecture": None, "tokenizer": None}
        return self.model_copy(update=its_own)
