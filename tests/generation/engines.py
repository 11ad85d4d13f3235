"""Both engines over the same small policy, for tests that hold for either."""

import os
import time
from pathlib import Path
from typing import Any, Literal

from small_models import EOS, MODEL, PAD, build_engine, tokenizer

from nemo_eppo.generation.build import write_hf_settings
from nemo_eppo.generation.engine import Engine, EngineLimits
from nemo_eppo.generation.trtllm_engine import TensorRTLLMEngine
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.settings.generation import TensorRTLLMConfig
from nemo_eppo.settings.model import ModelConfig

Kind = Literal["megatron", "tensorrt_llm"]
STAND_IN = Path(__file__).parent / "stand_in"
"""A package tensorrt_llm of TensorRT-LLM's signatures over transformers; only the engine's process finds it."""


def stand_in(**settings: Any) -> TensorRTLLMConfig:
    environment = {"PYTHONPATH": str(STAND_IN), **settings.pop("environment", {})}
    return TensorRTLLMConfig(environment=environment, timeout_minutes=2, **settings)


def trtllm_engine(
    chunks: list[Any],
    directory: Path,
    model: ModelConfig = MODEL,
    config: TensorRTLLMConfig | None = None,
    **limits: Any,
) -> TensorRTLLMEngine:
    """Collective; without weights until its first refit."""
    dtype = unwrap(chunks[0]).config.params_dtype
    if int(os.environ["RANK"]) == 0:
        write_hf_settings(directory / "ready", model, dtype, directory)
        (directory / "ready").rename(directory / "hf")
    while not (directory / "hf").exists():
        time.sleep(0.01)
    settings = {"eos_id": EOS, "pad_id": PAD, "max_batch_size": 8, "max_sequence_length": model.max_sequence_length}
    return TensorRTLLMEngine(
        model,
        dtype,
        config or stand_in(),
        EngineLimits(**(settings | {"tokenizer": tokenizer()} | limits)),
        hf_directory=directory / "hf",
        log=directory / "engine.log",
    )


def make_engine(kind: Kind, chunks: list[Any], directory: Path, **limits: Any) -> Engine:
    return build_engine(chunks, **limits) if kind == "megatron" else trtllm_engine(chunks, directory, **limits)
