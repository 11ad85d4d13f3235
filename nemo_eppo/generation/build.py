"""Builds the configured generation engine."""

from pathlib import Path
from typing import Any, assert_never

import torch

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.files import write_json
from nemo_eppo.generation.engine import Engine, EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.generation.replay import GraphRecorder
from nemo_eppo.generation.trtllm_checks import check_tensorrt_llm
from nemo_eppo.generation.trtllm_engine import TensorRTLLMEngine, map_sampling
from nemo_eppo.megatron import device
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.models import checkpoint_files
from nemo_eppo.models.hf_config import causal_architecture, hf_config
from nemo_eppo.models.hf_directory import CONFIG
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import EngineConfig, SamplingParams
from nemo_eppo.settings.model import ModelConfig, ParallelConfig


def check_engine(config: EngineConfig, model: ModelConfig, parallel: ParallelConfig, sampling: SamplingParams) -> None:
    """Raise ConfigError, before anything is started, if the engine cannot work here or sample in this way."""
    if config.cuda_graphs and not device.on_gpu():
        raise ConfigError("engine.cuda_graphs = true: there is no GPU here, expected false")
    if config.name == "tensorrt_llm":
        map_sampling(sampling, 0, 1, ())
        check_tensorrt_llm(config.tensorrt_llm, model, parallel)


def build_engine(
    config: EngineConfig,
    chunks: list[Any],
    model: ModelConfig,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    max_sequence_length: int,
    energy: EnergyProbeConfig,
    directory: Path,
) -> Engine:
    """Build the configured engine; collective.

    Args:
        chunks: the policy's model chunks.
        tokenizer_path: directory of `tokenizer`.
        max_sequence_length: longest prompt and response together, in tokens.
        energy: the energies to read while decoding, if the engine can.
        directory: the run directory, where an engine in a process of its own leaves its log and the model's settings.
    """
    limits = EngineLimits(tokenizer.eos_id, tokenizer.pad_id, config.max_batch_size, max_sequence_length, tokenizer)
    if config.name == "megatron":
        return MegatronEngine(chunks, limits, energy, GraphRecorder() if config.cuda_graphs else None)
    if config.name == "tensorrt_llm":
        dtype: torch.dtype = unwrap(chunks[0]).config.params_dtype
        hf_directory = directory / "engine_model"
        on_rank0(lambda: write_hf_settings(hf_directory, model, dtype, tokenizer_path))
        return TensorRTLLMEngine(
            model, dtype, config.tensorrt_llm, limits, hf_directory=hf_directory, log=directory / "engine.log"
        )
    assert_never(config.name)


def write_hf_settings(path: Path, model: ModelConfig, dtype: torch.dtype, tokenizer: Path) -> None:
    """Write a Hugging Face directory with the settings of a model and its tokenizer, but no weights."""
    path.mkdir(parents=True, exist_ok=True)
    settings = hf_config(model, causal_architecture(model)) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(path / CONFIG, settings)
    checkpoint_files.copy_tokenizer(tokenizer, path)
