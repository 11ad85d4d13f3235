"""Generation by TensorRT-LLM in processes of its own, on the GPUs of the actor, their weights refitted in memory.

The ranks of a replica form as many engines as they can, of consecutive ranks each. All of them gather the weights
(`export_tensors`) and share each bucket with the process of their engine, which the engine's first rank has started and
talks to. The engines of a replica share its prompts. A failure on any rank is one on all.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.generation import ipc
from nemo_eppo.generation.engine import check_limits, check_requests
from nemo_eppo.generation.refit import RefitError, pack
from nemo_eppo.megatron import device
from nemo_eppo.megatron.collectives import all_or_none
from nemo_eppo.megatron.runtime import PATIENCE, control_group, world_size
from nemo_eppo.models.families import family_of
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.models.layout import ParallelConfig
from nemo_eppo.models.model_config import ModelConfig
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.rollout.sampling import SamplingParams

ResultT = TypeVar("ResultT")

_PACKAGES = Path(__file__).parents[2]  # where the engine's process finds nemo_eppo
# of the launcher that started this rank: TensorRT-LLM or torch would take them for their own
_LAUNCHER = ("PMI", "MPI", "OMPI", "SLURM", "TORCHELASTIC")
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_LOG_TAIL = 3000
_VERSION = "1.2."  # 1.1 has no AsyncLLM, 1.3 other arguments


class EngineProcessError(RuntimeError):
    """The engine's process failed at a request, or ended."""


class TensorRTLLMConfig(Config):
    """The TensorRT-LLM engine; used with engine: tensorrt_llm."""

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine, all of one machine; the actor's layout may be another. Its replicas of R ranks have
    R / tensor_parallel_size engines each."""
    free_gpu_memory_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the GPU memory that is free after loading the engine which its KV cache takes."""
    max_num_tokens: int = Field(8192, ge=1)
    """Tokens that the engine computes at once."""
    bucket_megabytes: int = Field(512, ge=1)
    """Weights are sent in buckets of this size: what a refit costs in memory, on each GPU."""
    timeout_minutes: float = Field(60.0, gt=0)
    """For one request to the engine's process: its start, a bucket of weights, a rollout."""
    python: Path | None = None
    """Python that has tensorrt_llm, of another virtual environment; null for this one."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables that the engine's process gets besides."""


def check_tensorrt_llm(
    config: TensorRTLLMConfig, model: ModelConfig, parallel: ParallelConfig, where: str = "engine.tensorrt_llm"
) -> None:
    """ConfigError if an engine with these settings could not start here; nothing is started but a look for it."""
    size, ranks, family = config.tensor_parallel_size, parallel.model_parallel_size, family_of(model)
    windowed = model.sliding_window is not None and model.sliding_window < model.max_sequence_length
    if not family.tensorrt_llm or windowed:
        why = f"model.sliding_window = {model.sliding_window}" if windowed else f"{family.name} models"
        raise ConfigError(
            f"engine.name = 'tensorrt_llm' is not known to compute {why} as training does; expected 'megatron'"
        )
    if ranks % size:
        raise ConfigError(
            f"{where}.tensor_parallel_size = {size}: expected a divisor of {ranks}, the ranks of a replica of the actor"
        )
    for name, value in (("num_attention_heads", model.num_attention_heads), ("num_query_groups", model.kv_heads)):
        if value % size:
            raise ConfigError(f"{where}.tensor_parallel_size = {size}: the model's {name} = {value} is not divisible")
    world, here = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for engine in _engines(parallel, world, size):
        if len({rank // here for rank in engine}) > 1:
            raise ConfigError(
                f"{where}.tensor_parallel_size = {size}: expected engines within one machine, which runs {here} ranks; "
                f"ranks {', '.join(map(str, engine))} would make one"
            )
    if not device.number().isdigit():  # its Ray workers read CUDA_VISIBLE_DEVICES as integers
        raise ConfigError(
            f"engine.name = 'tensorrt_llm': CUDA_VISIBLE_DEVICES has to hold numbers, not {device.number()}"
        )
    python = _python(config)
    look = "from importlib.metadata import version; print(version('tensorrt_llm'))"
    try:
        looked = subprocess.run(
            [python, "-c", look], env=_environment(config, []), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(f"{where}.python = {python!r} cannot be run: {error}") from None
    found = looked.stdout.strip()
    if not found.startswith(_VERSION):
        raise ConfigError(
            f"engine.name = 'tensorrt_llm': {python} has "
            f"{f'tensorrt_llm {found}' if found else 'no package tensorrt_llm'}. Install tensorrt_llm 1.2 and ray on a "
            f"machine with GPUs (the container nvcr.io/nvidia/nemo:26.04 has them), set {where}.python to the Python "
            "of an environment that has them, or use engine.name = 'megatron'"
        )


class TensorRTLLMEngine:
    """An `Engine` whose every method is collective over all ranks of the job.

    Args:
        model: the actor's.
        dtype: of its weights.
        config: settings of the engine.
        hf_directory: config.json and tokenizer of the model, without weights.
        log: file for what an engine's process prints; the engine's first rank is put behind its name.
        eos_id: the token that ends a response.
        pad_id: fills batches.
        max_batch_size: prompts that one engine answers at once.
        max_sequence_length: longest prompt and response together.

    Raises:
        ConfigError: limits that no engine of this model can have.
        EngineProcessError: the process does not start.
    """

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        config: TensorRTLLMConfig,
        *,
        hf_directory: Path,
        log: Path,
        eos_id: int,
        pad_id: int,
        max_batch_size: int,
        max_sequence_length: int,
    ) -> None:
        limits = {"max_batch_size": max_batch_size, "max_sequence_length": max_sequence_length}
        check_limits(model, eos_id=eos_id, pad_id=pad_id, **limits)
        self._model, self._config = model, config
        self._eos_id, self._max_sequence_length = eos_id, max_sequence_length
        self._replica = _replica()
        gathered: list[tuple[str, str]] = [("", "")] * self._replica.size()
        dist.all_gather_object(gathered, (device.uuid(), device.number()), group=self._replica)
        size, rank = config.tensor_parallel_size, self._replica.rank()
        self._mine = slice(rank - rank % size, rank - rank % size + size)
        """Ranks of the replica that are this rank's engine."""
        self._devices, numbers = map(list, zip(*gathered[self._mine], strict=True))
        self._process: _Process | None = None
        start = {
            "model": str(hf_directory),
            "devices": self._devices,
            "expected": [(name, shape, str(dtype)) for name, shape in hf_names(model)],
            "eos_id": eos_id,
            "pad_id": pad_id,
            "free_gpu_memory_fraction": config.free_gpu_memory_fraction,
            "arguments": {
                "max_seq_len": max_sequence_length,
                "max_batch_size": max_batch_size,
                "max_num_tokens": config.max_num_tokens,
            },
        }
        if rank == self._mine.start:
            self._process = _Process(config, numbers, log.with_name(f"{log.name}.{dist.get_rank()}"))
        all_or_none(lambda: self._ask("start", **start))

    def refit(self, named_weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Send all weights, in the order of `hf_names`; see `Engine`. Versions have to increase."""
        if named_weights is None:
            raise TypeError("a TensorRT-LLM engine needs the weights themselves")
        weights = named_weights
        all_or_none(lambda: self._refit(weights, version))

    def _refit(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._ask("begin", version=version)
        packed = pack(
            named_weights, self._config.bucket_megabytes * 2**20, lambda size: ipc.allocate(size, device.device())
        )
        for number, bucket in enumerate(packed):
            digests = torch.stack([digest for _, digest, _ in bucket]).tolist()
            infos = [
                (name, tuple(tensor.shape), str(tensor.dtype), value)
                for (name, _, tensor), value in zip(bucket, digests, strict=True)
            ]
            device.synchronize()  # the other process does not wait for what this one has queued
            named = [(name, tensor) for name, _, tensor in bucket]
            # each can be opened once: one is for the check, one for AsyncLLM
            gathered: list[tuple[str, str]] = [("", "")] * self._replica.size()
            dist.all_gather_object(gathered, (ipc.handles(named), ipc.handles(named)), group=self._replica)
            to_check, to_load = (
                dict(zip(self._devices, texts, strict=True)) for texts in zip(*gathered[self._mine], strict=True)
            )
            self._ask("bucket", header=(version, number, infos), to_check=to_check, to_load=to_load)
        self._ask("finish", version=version)

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """One completion for each prompt; see `Engine`. All ranks of a replica give the same prompts, maybe none.

        Raises:
            ConfigError: a prompt, seed or sampling parameter that cannot work.
            RefitError: the engine has no weights.
            FloatingPointError: the model gives NaN.
        """
        return all_or_none(lambda: self._generate(prompt_ids, sampling, seeds))

    def _generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        check_requests(prompts, seeds, self._model.vocab_size, self._max_sequence_length)
        requests = [
            (prompt, map_sampling(sampling, seed, self._max_sequence_length - len(prompt)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        if not requests:
            return []
        size = self._config.tensor_parallel_size
        engines = self._replica.size() // size
        number = self._mine.start // size
        gathered: list[Any] = [None] * self._replica.size()
        dist.all_gather_object(gathered, self._ask("generate", requests=requests[number::engines]), self._replica)
        answers = gathered[::size]  # of the ranks that have the processes
        completions = []
        for index, (_, params) in enumerate(requests):
            version, answered = answers[index % engines]
            tokens, logprobs = answered[index // engines]
            completions.append(self._completion(tokens, logprobs, version, params["max_tokens"]))
        return completions

    def _completion(self, tokens: list[int], logprobs: list[float], version: int, limit: int) -> Completion:
        """Check that an answer ends as every engine's does."""
        if not torch.tensor(logprobs).isfinite().all():
            raise FloatingPointError(f"the model of weight version {version} gives NaN or infinite log-probs")
        stopped = tokens[-1:] == [self._eos_id]
        if self._eos_id in tokens[:-1] or not (stopped or len(tokens) == limit) or len(tokens) > limit:
            raise EngineProcessError(
                f"the engine answered with {len(tokens)} tokens, the last being {tokens[-1:]}: expected to end at the "
                f"first {self._eos_id} (EOS), which belongs to the answer, or after {limit} tokens"
            )
        return Completion(tokens, logprobs, FinishReason.STOP if stopped else FinishReason.LENGTH, version)

    def sleep(self) -> None:
        """Free the engine's weights and cache, to give training their memory."""
        all_or_none(lambda: self._ask("release"))

    def wake(self) -> None:
        """Take the memory again; the weights have to be sent anew."""
        all_or_none(lambda: self._ask("resume"))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()

    def _ask(self, command: str, **arguments: Any) -> Any:
        """What the process that this rank has started answers, else None; an error of one is one on its replica."""

        def ask() -> Any:
            return None if self._process is None else self._process.ask(command, arguments)

        return all_or_none(ask, self._replica)


def _replica() -> dist.ProcessGroup:
    """The ranks of this replica, for objects alone: no rank waits on a GPU that an engine computes on."""
    mine = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    replicas: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(replicas, mine, group=control_group())
    made = {tuple(ranks): None for ranks in replicas}  # every rank makes all groups, in the same order
    groups = {ranks: dist.new_group(list(ranks), timeout=PATIENCE, backend="gloo") for ranks in made}
    group: dist.ProcessGroup = groups[tuple(mine)]
    return group


def _engines(parallel: ParallelConfig, world: int, size: int) -> list[list[int]]:
    """The ranks of each engine, in Megatron's order: tensor, then data, then pipeline parallelism."""
    tensor, replicas = parallel.tensor_model_parallel_size, parallel.data_parallel_size(world)
    engines = []
    for replica in range(replicas):
        stages = [(stage * replicas + replica) * tensor for stage in range(parallel.pipeline_model_parallel_size)]
        ranks = [first + rank for first in stages for rank in range(tensor)]
        engines += [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return engines


def map_sampling(sampling: SamplingParams, seed: int, room: int) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's SamplingParams for one prompt.

    Its log-probs are after temperature, as ours; about filters its documentation is silent. The trainer's are after
    them, so a difference would show as engine mismatch.

    Args:
        seed: any 64-bit integer; TensorRT-LLM counts them from 0.
        room: tokens that the longest sequence leaves for the response.

    Raises:
        ConfigError: a setting without a counterpart, named.
    """
    mapping: dict[str, Callable[[], dict[str, Any]]] = {
        "max_new_tokens": lambda: {"max_tokens": min(sampling.max_new_tokens, room)},
        "temperature": lambda: {"temperature": sampling.temperature},
        "top_k": lambda: {"top_k": 1 if sampling.greedy else sampling.top_k},  # 0: all, there as here
        "top_p": lambda: {"top_p": sampling.top_p},
        "greedy": dict,  # see top_k
    }
    arguments: dict[str, Any] = {"seed": seed % 2**64}
    for name in type(sampling).model_fields:
        if name not in mapping:
            value = getattr(sampling, name)
            raise ConfigError(f"generation.{name} = {value!r}: TensorRT-LLM has no counterpart for this setting")
        arguments |= mapping[name]()
    return arguments


class _Process:
    """The engine's process as its one client sees it."""

    def __init__(self, config: TensorRTLLMConfig, gpus: list[str], log: Path) -> None:
        self._log, self._timeout = log, config.timeout_minutes * 60
        ours, theirs = socketpair()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [_python(config), "-m", "nemo_eppo.generation.trtllm_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(config, gpus),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._connection = Connection(ours.detach())

    def ask(self, command: str, arguments: dict[str, Any]) -> Any:
        """The answer to one request.

        Raises:
            RefitError: the process refused a refit.
            EngineProcessError: the request failed, was not answered in time, or the process has ended.
        """
        try:
            self._connection.send((command, arguments))
            if not self._connection.poll(self._timeout):
                self.close()
                raise EngineProcessError(f"'{command}' was not answered within {self._timeout:g} s; log: {self._log}")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            tail = self._log.read_text(errors="replace")[-_LOG_TAIL:]
            raise EngineProcessError(
                f"the engine's process ended at '{command}' with exit code {self._process.returncode}; "
                f"{self._log} ends with:\n{tail}"
            ) from None
        if answer[0] == "done":
            return answer[1]
        _, kind, message = answer
        if kind == RefitError.__name__:
            raise RefitError(message)
        raise EngineProcessError(f"'{command}' failed: {kind}: {message}; log: {self._log}")

    def close(self) -> None:
        """It ends by itself when nobody is there to ask; it is killed if that takes too long."""
        self._connection.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _python(config: TensorRTLLMConfig) -> str:
    return str(config.python) if config.python is not None else sys.executable


def _environment(config: TensorRTLLMConfig, gpus: list[str]) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER) and name not in _RANK
    }
    given = config.environment
    paths = [given.get("PYTHONPATH"), str(_PACKAGES), os.environ.get("PYTHONPATH")]
    return {
        **inherited,
        **device.only_these(gpus),
        "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "1",
        "TLLM_RAY_FORCE_LOCAL_CLUSTER": "1",  # each engine has workers of its own
        **given,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
