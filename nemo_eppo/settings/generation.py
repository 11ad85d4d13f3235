"""How responses are sampled, and by which engine."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from nemo_eppo.algorithms.choices import Distribution
from nemo_eppo.config import Config


class SamplingParams(Config):
    """How the engine samples responses; the trainer computes log-probs under the same distribution."""

    max_new_tokens: int = Field(gt=0)
    """Maximum number of tokens of a response, EOS included; one that reaches it without EOS or a stop string is
    truncated."""
    min_new_tokens: int = Field(default=0, ge=0)
    """Minimum number of tokens of a response: before it, neither EOS nor a special token of `stop_strings` can be
    sampled, and the trainer gives them probability 0, too. Stop strings of ordinary tokens end a response at any
    length."""
    stop_strings: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()
    """Texts that end a response, as EOS does. The text of a special token stands for this token. Others are looked for
    in the response's text, over token borders: the token that completes one is the last, nothing is cut off it, and no
    EOS is added. Reward models and functions get these tokens and this text; the response counts as finished."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Logits of tokens that are in the prompt or in the response so far are divided by this if positive, multiplied if
    negative; 1 for no penalty. PPO trains the penalised distribution, from which responses are sampled: log-probs of
    policy and reference, ratios, KL and entropy are its own, as with temperature, top_k and top_p."""
    temperature: float = Field(default=1.0, gt=0)
    """The logits are divided by this."""
    top_k: int = Field(default=0, ge=0)
    """Sample only among the k likeliest tokens; 0: among all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only among the likeliest tokens that together have this share of the probability; 1: among all."""
    greedy: bool = False
    """Always take the likeliest token, instead of sampling."""

    def distribution(self, ending: Sequence[int]) -> Distribution:
        """Return the distribution of sampled tokens, not of greedy ones; token ids in `ending` end a response."""
        return Distribution(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.min_new_tokens, tuple(ending)
        )

    @property
    def as_greedy(self) -> "SamplingParams":
        """The settings of greedy responses that begin and end as these do."""
        return self.model_copy(update={"greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0})

    @model_validator(mode="after")
    def _shortest_is_not_longest(self) -> "SamplingParams":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens = {self.min_new_tokens} is more than max_new_tokens = {self.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _greedy_samples_nothing(self) -> "SamplingParams":
        if self.greedy and (self.top_k, self.top_p) != (0, 1.0):
            raise ValueError("greedy takes the likeliest token; top_k and top_p must be left at 0 and 1")
        return self


PYTHON = "NEMO_EPPO_TENSORRT_LLM_PYTHON"
"""The environment variable in which an image names the Python that has tensorrt_llm."""


class TensorRTLLMConfig(Config):
    """Settings of the TensorRT-LLM engine."""

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine, all of one machine. It divides R, the ranks of a replica of the actor, which has
    R / tensor_parallel_size engines."""
    max_batch_size: int = Field(256, ge=1)
    """Sequences that one engine decodes at once, as far as its KV cache holds them; it makes CUDA graphs for up to so
    many. engine.max_batch_size is for the Megatron engine alone."""
    free_gpu_memory_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the GPU memory that its KV cache takes of what is free beside the trainer, optimizer state included, and
    the engine's weights."""
    max_num_tokens: int = Field(8192, ge=1)
    """Tokens that the engine computes at once. Longer prompts are computed in parts."""
    bucket_megabytes: int = Field(2048, ge=1)
    """Weights are sent through two buffers of this many MiB, or of all weights if they are fewer, which a refit needs
    as extra memory on each GPU while the KV cache has none."""
    timeout_minutes: float = Field(60.0, gt=0)
    """Minutes that the engine's process may take for its start, a bucket of weights, or a rollout."""
    python: Path | None = None
    """Python of an environment that has tensorrt_llm; null for the one that NEMO_EPPO_TENSORRT_LLM_PYTHON names, as it
    does in an image of docker/Dockerfile's target tensorrt_llm, else for the Python of this process."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables to add for the engine's process."""

    @model_validator(mode="after")
    def _tokens_for_all(self) -> "TensorRTLLMConfig":
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens = {self.max_num_tokens}: expected at least max_batch_size = {self.max_batch_size}, a "
                "token of each sequence"
            )
        return self

    @property
    def interpreter(self) -> str:
        """The Python that runs the engine's process."""
        return str(self.python or os.environ.get(PYTHON) or sys.executable)


class EngineConfig(Config):
    """The engine that generates rollouts."""

    name: Literal["megatron", "tensorrt_llm"] = "megatron"
    """megatron decodes with the trainer's own weights, on any machine; tensorrt_llm needs GPUs and that package."""
    max_batch_size: int = Field(64, ge=1)
    """Sequences that one replica decodes at once, for each pipeline stage. The KV cache has room for so many sequences
    of the present longest length, and up to half as much again. TensorRT-LLM has its own, tensorrt_llm.*."""
    cuda_graphs: bool = False
    """Whether the Megatron engine launches all kernels of a decoding step, or of a pipeline stage's part of it, at
    once, on GPUs. One by one their launches bound the speed of deep models. Not run on a GPU yet."""
    tensorrt_llm: TensorRTLLMConfig = TensorRTLLMConfig()
    """Settings of TensorRT-LLM; read only if it is the engine."""

    @model_validator(mode="after")
    def _graphs_are_megatrons(self) -> "EngineConfig":
        if self.cuda_graphs and self.name != "megatron":
            raise ValueError(f"cuda_graphs = true is for name = 'megatron'; {self.name} makes graphs of its own")
        return self
