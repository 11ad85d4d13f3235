"""Generation by TensorRT-LLM in its own processes on the actor's GPUs; weights are passed to them in GPU memory.

A replica's ranks form as many engines as they can, each of consecutive ranks. All ranks gather the weights
(`export_tensors`) and share each bucket with their engine's process, which the engine's first rank starts and talks to.
The engines of a replica share its prompts. A failure on one rank is raised on all.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.generation import ipc
from nemo_eppo.generation.engine import Limits, check_requests
from nemo_eppo.generation.refit import RefitError, pack
from nemo_eppo.generation.stops import Stops
from nemo_eppo.megatron import device
from nemo_eppo.megatron.collectives import all_or_none
from nemo_eppo.megatron.runtime import PATIENCE, control_group, world_size
from nemo_eppo.models.families import family_of
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.settings.generation import SamplingParams, TensorRTLLMConfig
from nemo_eppo.settings.model import ModelConfig, ParallelConfig

ResultT = TypeVar("ResultT")

_PACKAGES = Path(__file__).parents[2]  # where the engine's process finds nemo_eppo
# variables of the launcher of this rank, which TensorRT-LLM or torch would take for their own launcher's
_LAUNCHER = ("PMI", "MPI", "OMPI", "SLURM", "TORCHELASTIC")
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_LOG_TAIL = 3000
_VERSION = "1.2."  # 1.1 has no AsyncLLM, 1.3 other arguments


class EngineProcessError(RuntimeError):
    """The engine's process failed at a request, or ended."""


def check_tensorrt_llm(
    config: TensorRTLLMConfig, model: ModelConfig, parallel: ParallelConfig, where: str = "engine.tensorrt_llm"
) -> None:
    """Raise ConfigError if an engine with these settings cannot start here; starts only Python, to find the package."""
    size, ranks, family = config.tensor_parallel_size, parallel.model_parallel_size, family_of(model)
    unknown = [] if family.tensorrt_llm else [f"{family.name} models"]
    if model.sliding_window is not None and model.sliding_window < model.max_sequence_length:
        unknown.append(f"model.sliding_window = {model.sliding_window}")
    if model.rope_scaling is not None and model.rope_scaling.rope_type != "llama3":
        unknown.append(f"model.rope_scaling.rope_type = {model.rope_scaling.rope_type!r}")
    if unknown:
        raise ConfigError(
            f"engine.name = 'tensorrt_llm' is not known to compute {', '.join(unknown)} as training does; "
            "expected 'megatron'"
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
    python = str(config.python or sys.executable)
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
        model: the actor's model.
        dtype: dtype of its weights.
        hf_directory: config.json and tokenizer of the model, without weights.
        log: file for the output of the engine's process, to whose name the engine's first rank is added.

    Raises:
        ConfigError: limits that no engine of this model can have.
        EngineProcessError: the process does not start.
    """

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        config: TensorRTLLMConfig,
        limits: Limits,
        *,
        hf_directory: Path,
        log: Path,
    ) -> None:
        limits.check(model)
        self._model, self._config, self._limits = model, config, limits
        self._replica = _replica()
        gathered: list[tuple[str, str]] = [("", "")] * self._replica.size()
        dist.all_gather_object(gathered, (device.uuid(), device.number()), group=self._replica)
        size, rank = config.tensor_parallel_size, self._replica.rank()
        self._mine = slice(rank - rank % size, rank - rank % size + size)
        """The ranks, within the replica, of this rank's engine."""
        self._devices, numbers = map(list, zip(*gathered[self._mine], strict=True))
        self._process: _Process | None = None
        start = {
            "model": str(hf_directory),
            "devices": self._devices,
            "expected": [(name, shape, str(dtype)) for name, shape in hf_names(model)],
            "pad_id": limits.pad_id,
            "free_gpu_memory_fraction": config.free_gpu_memory_fraction,
            "arguments": {
                "max_seq_len": limits.max_sequence_length,
                "max_batch_size": limits.max_batch_size,
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
            # a handle can be opened once: one is for the check, one for AsyncLLM
            gathered: list[tuple[str, str]] = [("", "")] * self._replica.size()
            dist.all_gather_object(gathered, (ipc.handles(named), ipc.handles(named)), group=self._replica)
            to_check, to_load = (
                dict(zip(self._devices, texts, strict=True)) for texts in zip(*gathered[self._mine], strict=True)
            )
            self._ask("bucket", header=(version, number, infos), to_check=to_check, to_load=to_load)
        self._ask("finish", version=version)

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """Return one completion for each prompt; see `Engine`. All ranks of a replica give the same prompts, or none.

        Raises:
            ConfigError: a prompt, seed or sampling parameter that cannot work.
            RefitError: the engine has no weights.
            FloatingPointError: the model gives NaN.
        """
        return all_or_none(lambda: self._generate(prompt_ids, sampling, seeds))

    def _generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        longest = self._limits.max_sequence_length
        check_requests(prompts, seeds, self._model.vocab_size, longest)
        stops = Stops(sampling.stop_strings, self._limits.eos_id, self._limits.tokenizer)
        requests = [
            (prompt, map_sampling(sampling, seed, longest - len(prompt), stops.ids))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        if not requests:
            return []
        size = self._config.tensor_parallel_size
        engines = self._replica.size() // size
        number = self._mine.start // size
        gathered: list[Any] = [None] * self._replica.size()
        dist.all_gather_object(gathered, self._ask("generate", requests=requests[number::engines]), self._replica)
        answers = gathered[::size]  # answers of the ranks that have a process
        completions = []
        for index, (_, params) in enumerate(requests):
            version, answered = answers[index % engines]
            tokens, logprobs = answered[index // engines]
            completions.append(_completion(tokens, logprobs, version, params["max_tokens"], stops))
        return completions

    def sleep(self) -> None:
        """Free the engine's weights and cache, to give training their memory."""
        all_or_none(lambda: self._ask("release"))

    def wake(self) -> None:
        """Take the memory again; the weights have to be sent again."""
        all_or_none(lambda: self._ask("resume"))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()

    def _ask(self, command: str, **arguments: Any) -> Any:
        """Ask the process that this rank has started, and return its answer; None if it has none.

        An error is raised on all ranks of the replica.
        """

        def ask() -> Any:
            return None if self._process is None else self._process.ask(command, arguments)

        return all_or_none(ask, self._replica)


def _replica() -> dist.ProcessGroup:
    """Make a gloo group of this replica's ranks, so that none waits on a GPU on which an engine computes."""
    mine = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    replicas: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(replicas, mine, group=control_group())
    made = {tuple(ranks): None for ranks in replicas}  # every rank makes all groups, in the same order
    groups = {ranks: dist.new_group(list(ranks), timeout=PATIENCE, backend="gloo") for ranks in made}
    group: dist.ProcessGroup = groups[tuple(mine)]
    return group


def _engines(parallel: ParallelConfig, world: int, size: int) -> list[list[int]]:
    """Return the ranks of each engine; Megatron counts them over tensor, then data, then pipeline parallelism."""
    tensor, replicas = parallel.tensor_model_parallel_size, parallel.data_parallel_size(world)
    engines = []
    for replica in range(replicas):
        stages = [(stage * replicas + replica) * tensor for stage in range(parallel.pipeline_model_parallel_size)]
        ranks = [first + rank for first in stages for rank in range(tensor)]
        engines += [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return engines


def _completion(tokens: list[int], logprobs: list[float], version: int, limit: int, stops: Stops) -> Completion:
    """Make a completion, after a check that the answer ends where it should.

    TensorRT-LLM 1.2 knows a stop string only as one sequence of tokens, and would miss it in all others. So it does not
    get those that are no token of their own, and the answer is cut here: what comes before does not depend on the rest.
    """
    if not torch.tensor(logprobs).isfinite().all():
        raise FloatingPointError(f"the model of weight version {version} gives NaN or infinite log-probs")
    stopped = tokens[-1:] and tokens[-1] in stops.ids
    if set(tokens[:-1]) & set(stops.ids) or not (stopped or len(tokens) == limit) or len(tokens) > limit:
        raise EngineProcessError(
            f"the engine answered with {len(tokens)} tokens, the last being {tokens[-1:]}: expected to end at the "
            f"first of {', '.join(map(str, stops.ids))} (EOS, stop strings), which belongs to the answer, or after "
            f"{limit} tokens"
        )
    end = stops.end(tokens)
    reason = FinishReason.LENGTH if end is None else FinishReason.STOP
    return Completion(tokens[:end], logprobs[:end], reason, version)


def map_sampling(sampling: SamplingParams, seed: int, room: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's SamplingParams for one prompt.

    Like ours, its log-probs are those after penalty and temperature; whether they are also after filters, as the
    trainer's are, its documentation does not say. A difference would show as engine mismatch.

    Args:
        seed: any 64-bit integer; TensorRT-LLM takes those from 0 to 2^64 - 1.
        room: tokens left for the response in the longest sequence.
        stop_ids: tokens that end a response, see `Stops`.

    Raises:
        ConfigError: a setting that TensorRT-LLM does not have, named.
    """
    mapping: dict[str, Callable[[], dict[str, Any]]] = {
        "max_new_tokens": lambda: {"max_tokens": min(sampling.max_new_tokens, room)},
        "temperature": lambda: {"temperature": sampling.temperature},
        "top_k": lambda: {"top_k": 1 if sampling.greedy else sampling.top_k},  # 0 keeps all, in both
        "top_p": lambda: {"top_p": sampling.top_p},
        "greedy": dict,  # see top_k
        "repetition_penalty": lambda: {"repetition_penalty": sampling.repetition_penalty},
        "stop_strings": lambda: {"stop_token_ids": list(stop_ids)},  # for the others see _completion
    }
    if not sampling.min_new_tokens:  # its min_tokens holds for end_id alone, which is left out of answers
        mapping["min_new_tokens"] = dict
    arguments: dict[str, Any] = {"seed": seed % 2**64}
    for name, value in sampling:
        if name not in mapping:
            raise ConfigError(
                f"generation.{name} = {value!r}: TensorRT-LLM has no counterpart for this setting; expected "
                f"{type(sampling).model_fields[name].default!r}, or engine.name = 'megatron'"
            )
        arguments |= mapping[name]()
    return arguments


class _Process:
    """Starts an engine's process and talks to it."""

    def __init__(self, config: TensorRTLLMConfig, gpus: list[str], log: Path) -> None:
        self._log, self._timeout = log, config.timeout_minutes * 60
        ours, theirs = socketpair()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [config.python or sys.executable, "-m", "nemo_eppo.generation.trtllm_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(config, gpus),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._connection = Connection(ours.detach())

    def ask(self, command: str, arguments: dict[str, Any]) -> Any:
        """Send one request and return the answer.

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
        """Close the connection, at which the process ends by itself; kill it if it does not in 30 s."""
        self._connection.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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
