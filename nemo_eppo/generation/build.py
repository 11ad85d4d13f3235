"""Which engine generates, and how it is made."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from nemo_eppo.config import Config
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.generation.engine import Engine
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.generation.trtllm_engine import TensorRTLLMConfig, TensorRTLLMEngine, check_tensorrt_llm
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.models import checkpoint_files
from nemo_eppo.models.hf_config import causal_architecture, hf_config
from nemo_eppo.models.hf_directory import CONFIG
from nemo_eppo.models.layout import ParallelConfig
from nemo_eppo.models.model_config import ModelConfig


class EngineConfig(Config):
    """What generates the rollouts."""

    name: Literal["megatron", "tensorrt_llm"] = "megatron"
    """megatron decodes with the trainer's own weights, on any machine; tensorrt_llm needs GPUs and its package."""
    max_batch_size: int = Field(64, ge=1)
    """Sequences that one replica decodes at once; bounds the KV cache."""
    tensorrt_llm: TensorRTLLMConfig = TensorRTLLMConfig()


def check_engine(config: EngineConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """ConfigError if the engine cannot work here; before anything is started."""
    if config.name == "tensorrt_llm":
        check_tensorrt_llm(config.tensorrt_llm, model, parallel)


def build_engine(
    config: EngineConfig,
    chunks: list[Any],
    model: ModelConfig,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    max_sequence_length: int,
    directory: Path,
) -> Engine:
    """The configured engine; collective.

    Args:
        chunks: of the policy.
        tokenizer_path: directory of `tokenizer`.
        max_sequence_length: longest prompt and response together.
        directory: of the run; an engine in a process of its own leaves its log, and what it was told of the model.
    """
    limits: dict[str, int] = {
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "max_batch_size": config.max_batch_size,
        "max_sequence_length": max_sequence_length,
    }
    if config.name == "megatron":
        return MegatronEngine(chunks, model, **limits)
    dtype: torch.dtype = unwrap(chunks[0]).config.params_dtype
    hf_directory = directory / "engine_model"
    on_rank0(lambda: write_hf_settings(hf_directory, model, dtype, tokenizer_path))
    return TensorRTLLMEngine(
        model, dtype, config.tensorrt_llm, hf_directory=hf_directory, log=directory / "engine.log", **limits
    )


def write_hf_settings(path: Path, model: ModelConfig, dtype: torch.dtype, tokenizer: Path) -> None:
    """A Hugging Face directory without weights."""
    path.mkdir(parents=True, exist_ok=True)
    settings = hf_config(model, causal_architecture(model)) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (path / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    checkpoint_files.copy_tokenizer(tokenizer, path)
