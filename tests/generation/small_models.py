"""Small policies with the same weights in every layout, and the slow but obvious ways to decode with them."""

from typing import Any

import torch
from torch import Tensor

from nemo_eppo.conversion.hf_weights import hf_names, load_tensors
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.model_config import ModelConfig, Precision
from nemo_eppo.megatron.runtime import ParallelConfig, initialize

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=61,  # odd, so that tensor parallelism pads it
    max_sequence_length=64,
)
EOS, PAD = 2, 0


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Whole tensors under Hugging Face names, of a size that gives distributions with some likely tokens."""
    draw = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in hf_names(model):
        noise = torch.randn(shape, generator=draw)
        weights[name] = 1 + 0.3 * noise if "norm" in name else noise * (0.5 if len(shape) == 1 else 0.2)
    return weights


def build_policy(layout: dict[str, Any], model: ModelConfig = MODEL, precision: Precision = "fp32") -> list[Any]:
    """A policy with `random_weights`, in a process that `run_ranks` started."""
    parallel = ParallelConfig(**layout)
    initialize(parallel, seed=1)
    chunks: list[Any] = build_model(model, parallel, head="lm", precision=precision)
    load_tensors(chunks, model, random_weights(model).__getitem__)
    return chunks


def build_engine(chunks: list[Any], model: ModelConfig = MODEL, **changes: Any) -> MegatronEngine:
    settings = {"eos_id": EOS, "pad_id": PAD, "max_batch_size": 8, "max_sequence_length": model.max_sequence_length}
    return MegatronEngine(chunks, model, **(settings | changes))


def random_prompts(lengths: list[int], vocab_size: int = MODEL.vocab_size) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab_size, (length,), generator=draw).tolist() for length in lengths]
