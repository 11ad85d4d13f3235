"""Models of the same shape in our classes and in those of transformers, with fresh weights, and rows for them."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_eppo.megatron import device
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.models.numerics import DTYPES
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.model import Head, ModelConfig, ParallelConfig, Precision
from nemo_eppo.settings.training import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=1e-6)
ONE = ParallelConfig()
"""Layout of a model on one rank."""


def shape(layers: int = 4, width: int = 256, vocabulary: int = 1024, window: int = 512) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=4 * width,
        num_attention_heads=8,
        vocab_size=vocabulary,
        max_sequence_length=window,
    )


def our_runner(
    model: ModelConfig,
    micro_batch_size: int = 64,
    *,
    head: Head = "lm",
    precision: Precision = "fp32",
    trained: bool = False,
    distributed: bool | None = None,
    probe: EnergyProbeConfig | None = None,
    micro_batch_tokens: int | None = None,
    parallel: ParallelConfig = ONE,
) -> ModelRunner:
    initialize(parallel, seed=1)
    chunks = build_model(model, parallel, head=head, precision=precision)
    optimizer = scheduler = None
    if trained:
        settings = OPTIMIZER if distributed is None else OPTIMIZER.model_copy(update={"distributed": distributed})
        chunks = wrap_data_parallel(chunks, settings, precision)
        optimizer, scheduler = build_optimizer(chunks, settings, precision, total_steps=10_000)
    return ModelRunner(
        chunks,
        micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        optimizer=optimizer,
        scheduler=scheduler,
        probe=EnergyProbe(probe, chunks, model.num_layers) if probe else None,
    )


def their_model(model: ModelConfig, precision: Precision = "fp32") -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=model.tie_embeddings,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_sequence_length,
        eos_token_id=model.vocab_size - 1,
    )
    with device.device():
        return LlamaForCausalLM._from_config(config, dtype=DTYPES[precision])


def rows_of(lengths: Tensor, vocabulary: int) -> Rows:
    """Random rows of these lengths [N], in the order in which `ModelRunner.infer` takes them; only the first token of a
    row is its prompt."""
    tokens = torch.randint(vocabulary, (len(lengths), int(lengths.max())))
    inside = torch.arange(tokens.size(1)) < lengths[:, None] - 1
    return {"tokens": tokens, "lengths": lengths, "targets": torch.where(inside, tokens.roll(-1, 1), IGNORE)}


def even_rows(rows: int, length: int, vocabulary: int) -> Rows:
    return rows_of(torch.full((rows,), length), vocabulary)


def thousandth_nll(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of `train_step` for any number of micro-batches: a thousandth of the negative log-probs' sum."""
    return -output[..., 0].sum() / 1000, {}


def mean_nll(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `train_step` if all rows are in one micro-batch: the mean negative log-prob of the targets."""
    return -output[..., 0].sum() / (rows["targets"] != IGNORE).sum(), {}
