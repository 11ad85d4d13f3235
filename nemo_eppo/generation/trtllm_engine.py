"""Generation by TensorRT-LLM in its own processes on the actor's GPUs; weights are passed to them in GPU memory.

A replica's ranks form as many engines as they can, each of consecutive ranks. All ranks gather the weights
(`export_tensors`) and share each bucket with their engine's process, which the engine's first rank starts and talks to.
The engines of a replica share its prompts. A failure on one rank is raised on all.

Trainer and engine take turns with the GPU's memory. An engine starts asleep: it has neither weights nor a KV cache
while the trainer trains or loads. Torch's cached memory is freed before an engine allocates its weights, and again,
with the buffers of the refit, before it allocates its KV cache.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.generation import ipc
from nemo_eppo.generation.engine import EngineLimits, check_requests
from nemo_eppo.generation.refit import Bucket, RefitError, TensorInfo, aligned, pack
from nemo_eppo.generation.stops import Stops
from nemo_eppo.generation.trtllm_client import EngineProcess, EngineProcessError
from nemo_eppo.megatron import device
from nemo_eppo.megatron.collectives import PeerError, all_or_none, sibling
from nemo_eppo.megatron.runtime import PATIENCE
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.settings.generation import SamplingParams, TensorRTLLMConfig
from nemo_eppo.settings.model import ModelConfig

_SHARED_ERRORS = (RefitError, EngineProcessError, PeerError, ConfigError, FloatingPointError)
"""Errors that all ranks of a replica raise together, so that none is left waiting in a collective of a refit."""


class TensorRTLLMEngine:
    """An `Engine` whose every method is collective over all ranks of the job.

    Args:
        model: the actor's model.
        dtype: dtype of its weights.
        hf_directory: config.json and tokenizer of the model, without weights.
        log: file for the output of the engine's process; the engine's first rank is appended to its name.

    Raises:
        ConfigError: limits that no engine of this model can have.
        EngineProcessError: the process does not start.
    """

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        config: TensorRTLLMConfig,
        limits: EngineLimits,
        *,
        hf_directory: Path,
        log: Path,
    ) -> None:
        limits.check(model)
        self._model, self._config, self._limits = model, config, limits
        # by gloo: none waits on a GPU on which an engine computes
        self._replica = sibling(parallel_state.get_model_parallel_group(), "gloo", PATIENCE)
        numbers = [""] * self._replica.size()
        dist.all_gather_object(numbers, device.number(), group=self._replica)
        size, rank = config.tensor_parallel_size, self._replica.rank()
        self._mine = slice(rank - rank % size, rank - rank % size + size)
        """The ranks, within the replica, of this rank's engine."""
        expected = [TensorInfo(name, shape, str(dtype)) for name, shape in hf_names(model)]
        whole = sum(aligned(math.prod(info.shape) * dtype.itemsize) for info in expected)
        self._bucket_bytes = min(config.bucket_megabytes * 2**20, whole)
        start = {
            "model": str(hf_directory),
            "gpus": size,
            "expected": expected,
            "pad_id": limits.pad_id,
            "free_gpu_memory_fraction": config.free_gpu_memory_fraction,
            "max_seq_len": limits.max_sequence_length,
            "max_batch_size": config.max_batch_size,
            "max_num_tokens": config.max_num_tokens,
        }
        self._process: EngineProcess | None = None
        if rank == self._mine.start:
            gpus = numbers[self._mine]
            self._process = EngineProcess(config, gpus, log.with_name(f"{log.name}.{dist.get_rank()}"))
        self._free_cached_memory()  # the KV cache is a share of the memory that is free now
        all_or_none(lambda: self._ask("start", **start))

    def refit(self, named_weights: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Wake up and take over all weights, in the order of `hf_names`; see `Engine`. Versions have to increase."""
        if named_weights is None:
            raise TypeError("a TensorRT-LLM engine needs the weights themselves")
        weights = named_weights
        all_or_none(lambda: self._refit(weights, version), expected=_SHARED_ERRORS)

    def _refit(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._free_cached_memory()
        self._ask("begin", version=version)
        self._send(named_weights, version)
        self._ask("finish", version=version)
        self._free_cached_memory()  # including the buckets
        self._ask("take_cache")

    def _send(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Fill one buffer while the engines load from the other."""
        packed = pack(named_weights, self._bucket_bytes, lambda size: ipc.allocate(size, device.device()))
        for number, bucket in enumerate(packed):
            digests = torch.stack([digest for _, digest, _ in bucket]).tolist()
            infos = [
                TensorInfo(name, tuple(tensor.shape), str(tensor.dtype), value)
                for (name, _, tensor), value in zip(bucket, digests, strict=True)
            ]
            device.synchronize()  # the other process does not wait for this one's queued copies
            handles = [""] * self._replica.size()
            dist.all_gather_object(handles, ipc.handles([(name, t) for name, _, t in bucket]), group=self._replica)
            if number:
                self._on_process(EngineProcess.answer)
            self._send_request("bucket", bucket=Bucket(version, number, infos), handles=handles[self._mine])
        self._on_process(EngineProcess.answer)

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """Return one completion for each prompt; see `Engine`. All ranks of a replica give the same prompts, or none.

        Raises:
            ConfigError: a prompt, seed or sampling parameter that cannot work.
            RefitError: the engine has no weights.
            FloatingPointError: the model gives NaN.
        """
        return all_or_none(lambda: self._generate(prompt_ids, sampling, seeds), expected=_SHARED_ERRORS)

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
        mine = requests[self._mine.start // size :: engines]

        def answer(process: EngineProcess) -> list[Completion]:
            version, answered = process.ask("generate", {"requests": mine})
            return [
                _completion(tokens, logprobs, version, params["max_tokens"], stops)
                for (tokens, logprobs), (_, params) in zip(answered, mine, strict=True)
            ]

        gathered: list[Any] = [None] * self._replica.size()
        dist.all_gather_object(gathered, self._on_process(answer), self._replica)
        answers = gathered[::size]  # of the ranks that have a process
        return [answers[index % engines][index // engines] for index in range(len(requests))]

    def sleep(self) -> None:
        """Free all of the engine's GPU memory for training; the weights have to be sent again."""
        all_or_none(lambda: self._ask("release"))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()

    def _free_cached_memory(self) -> None:
        """Free the GPU memory in torch's cache on all ranks of the replica, for their engines."""
        device.empty_cache()
        dist.barrier(self._replica)

    def _ask(self, command: str, **arguments: Any) -> Any:
        """Send a request to this rank's process and return its answer; None if this rank has no process."""
        return self._on_process(lambda process: process.ask(command, arguments))

    def _send_request(self, command: str, **arguments: Any) -> None:
        """Send a request to this rank's process without waiting for the answer."""
        self._on_process(lambda process: process.send(command, arguments))

    def _on_process(self, work: Callable[[EngineProcess], Any]) -> Any:
        """Call `work` with this rank's process if it has one; an error is raised on all ranks of the replica."""
        return all_or_none(lambda: None if self._process is None else work(self._process), self._replica)


def _completion(tokens: list[int], logprobs: list[float], version: int, limit: int, stops: Stops) -> Completion:
    """Check that an answer ends where it should, and make a completion of it.

    TensorRT-LLM 1.2 finds a stop string only as one sequence of tokens, and would miss all others. So it gets only
    those that are a single token; at the others the answer is cut here: the tokens before do not depend on the rest.
    """
    read = torch.tensor(logprobs)
    if not read.isfinite().all():
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
    return Completion(tokens[:end], read[:end].clone(), reason, version)


def map_sampling(sampling: SamplingParams, seed: int, room: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's SamplingParams for one prompt.

    Its log-probs are those after penalty and temperature and, unlike the trainer's, before top_k and top_p: where these
    keep a share m of the distribution, engine mismatch is -log(m).

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
