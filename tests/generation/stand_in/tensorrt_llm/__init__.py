"""Stands for TensorRT-LLM 1.2 up to its API: the signatures that nemo_eppo uses, over a transformers model.

Only what its sources accept is accepted, anything else is a TypeError. Weights start as NaN and come only through the
workers, of which each GPU has one; prompts share a real prefix cache, which only finalising drops.

STAND_IN_MEMORY=directory: what it holds goes into the account of GPU memory there, as 1.2 allocates it: its KV cache is
a share of what is free when it starts.
STAND_IN_SKIP=text: after the first refit, tensors whose names hold it are not loaded.
STAND_IN_PERTURB=x: finalising multiplies every matrix by 1 + x. STAND_IN_KEEP_PREFIXES=1: finalising keeps the cache.
STAND_IN_DUMP=directory: finalising writes all weights there, in a file of this process. STAND_IN_CRASH=1: generating
ends the process.
"""

import asyncio
import copy
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from memory_account import Account
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

torch.set_num_threads(1)
WEIGHTS = "model"
CACHE = "kv_cache"
TAGS = {
    WEIGHTS,
    CACHE,
    "sampler",
    "drafter",
    "guided_decoder",
    "spec_resource_manager",
    "model_extra",
    "executor_extra",
}
TAGS |= {"draft_model"}  # the values of 1.2's ExecutorMemoryType that can be released
for name in ("PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"):
    assert name not in os.environ, f"{name} is the trainer's"
assert os.environ["TLLM_DISABLE_MPI"] == "1"


class SamplingParams:
    def __init__(
        self,
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        seed: int,
        end_id: int,
        pad_id: int,
        stop_token_ids: list[int],
        include_stop_str_in_output: bool,
        detokenize: bool,
        logprobs: int,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed}: expected an unsigned 64-bit integer")
        self.max_tokens, self.temperature, self.top_p, self.top_k = max_tokens, temperature, top_p, top_k
        self.seed, self.stop_token_ids, self.include_stop = seed, stop_token_ids, include_stop_str_in_output
        self.logprobs, self.repetition_penalty = logprobs, repetition_penalty


class AsyncLLM:
    def __init__(
        self,
        *,
        model: str,
        backend: str,
        load_format: str,
        tensor_parallel_size: int,
        kv_cache_config: KvCacheConfig,
        cuda_graph_config: CudaGraphConfig,
        sampler_type: str,
        ray_worker_extension_cls: str,
        enable_sleep: bool,
        max_seq_len: int,
        max_input_len: int = 1024,
        max_batch_size: int,
        max_num_tokens: int,
        enable_chunked_prefill: bool,
    ) -> None:
        assert (backend, load_format, sampler_type, enable_sleep) == ("pytorch", "dummy", "TRTLLMSampler", True)
        assert ray.resources == {"cpus": tensor_parallel_size, "gpus": tensor_parallel_size}
        assert (cuda_graph_config.enable_padding, cuda_graph_config.max_batch_size) == (True, max_batch_size)
        self._config, self._gpus, self._extension = (
            AutoConfig.from_pretrained(model),
            tensor_parallel_size,
            ray_worker_extension_cls,
        )
        self._cache_share, self._reuses = kv_cache_config.free_gpu_memory_fraction, kv_cache_config.enable_block_reuse
        self._max_seq_len, self._max_input_len = max_seq_len, max_input_len
        self._max_prompt = max_seq_len if enable_chunked_prefill else max_num_tokens
        self._model: Any = None
        self._workers: list[Any] = []
        self._released: set[str] = set()
        self._prefixes: dict[tuple[int, ...], DynamicCache] = {}
        self._finalised = False
        self._lock = asyncio.Lock()
        self.model_engine = SimpleNamespace(model=SimpleNamespace(named_parameters=self._own_parameters))
        self._account = Account(Path(os.environ["STAND_IN_MEMORY"])) if "STAND_IN_MEMORY" in os.environ else None

    async def setup_async(self) -> "AsyncLLM":
        module, extension = self._extension.rsplit(".", 1)
        worker = type("Worker", (getattr(importlib.import_module(module), extension),), {"engine": self})
        for device_id in range(self._gpus):
            self._workers.append(worker())
            self._workers[-1].device_id = device_id
        self._model = AutoModelForCausalLM.from_config(self._config).eval()
        self._fill_with_nan()
        self._sizes = {WEIGHTS: sum(parameter.nbytes for parameter in self._model.parameters())}
        if self._account is not None:
            self._account.hold(WEIGHTS, self._sizes[WEIGHTS])
            self._sizes[CACHE] = int(self._account.free * self._cache_share)
            self._account.hold(CACHE, self._sizes[CACHE])
        return self

    def _fill_with_nan(self) -> None:
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.fill_(torch.nan)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self._workers]

    def load(self, device_id: int, name: str, tensor: Tensor) -> None:
        """A worker loads a tensor; the first one's become those of the model."""
        assert WEIGHTS not in self._released, "new weights without memory for them"
        skipped = os.environ.get("STAND_IN_SKIP")
        if device_id == 0 and not (self._finalised and skipped and skipped in name):
            self._model.get_parameter(name).data.copy_(tensor)

    def _own_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as 1.2's modules hold them, under their names."""
        tensors = dict(self._model.named_parameters())
        for name, tensor in tensors.items():
            if "q_proj" in name:
                parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                yield name.replace("q_proj", "qkv_proj"), torch.cat(parts)
            elif "gate_proj" in name:
                yield name.replace("gate", "gate_up"), torch.cat([tensor, tensors[name.replace("gate", "up")]])
            elif not any(part in name for part in ("k_proj", "v_proj", "up_proj")):
                yield name, tensor

    def finalise(self) -> None:
        """Done by each of the workers."""
        self._finalised = True
        parameters = dict(self._model.named_parameters())
        if "STAND_IN_PERTURB" in os.environ:
            for parameter in parameters.values():
                if parameter.dim() == 2:
                    parameter.data.mul_(1 + float(os.environ["STAND_IN_PERTURB"]))
        if "STAND_IN_DUMP" in os.environ:
            file = os.path.join(os.environ["STAND_IN_DUMP"], f"{os.getpid()}.pt")
            torch.save({name: parameter.data for name, parameter in parameters.items()}, file)
        if "STAND_IN_KEEP_PREFIXES" not in os.environ:
            self._prefixes.clear()

    async def release(self, tags: list[str]) -> None:
        assert set(tags) <= TAGS - self._released
        self._released |= set(tags)
        assert self._released == TAGS, f"{TAGS - self._released} stay in memory"
        self._fill_with_nan()
        self._prefixes.clear()
        if self._account is not None:
            for tag in self._sizes:
                self._account.hold(tag, 0)

    async def resume(self, tags: list[str]) -> None:
        assert set(tags) <= self._released
        self._released -= set(tags)
        if self._account is not None:
            for tag in set(tags) & self._sizes.keys():
                self._account.hold(tag, self._sizes[tag])

    async def generate_async(self, inputs: list[int], sampling_params: SamplingParams) -> SimpleNamespace:
        if "STAND_IN_CRASH" in os.environ:
            os._exit(7)
        assert not self._released, "generate without memory"
        assert len(inputs) < self._max_seq_len
        assert len(inputs) <= min(self._max_input_len, self._max_prompt), "a prompt that 1.2 refuses"
        async with self._lock:
            tokens, logprobs = self._generate(inputs, sampling_params)
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs)])

    @torch.no_grad()
    def _generate(
        self, prompt: list[int], params: SamplingParams
    ) -> tuple[list[int], list[dict[int, SimpleNamespace]]]:
        cache, known = self._prefix(prompt)
        draw = torch.Generator().manual_seed(params.seed % 2**63)
        tokens: list[int] = []
        logprobs = []
        ids = prompt[known:]
        while len(tokens) < params.max_tokens and not set(tokens[-1:]) & set(params.stop_token_ids):
            logits = self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1].float()
            if not tokens and self._reuses:
                self._prefixes[tuple(prompt)] = copy.deepcopy(cache)
            penalised, seen = logits.clone(), [*prompt, *tokens]
            positive = logits[seen] > 0
            penalised[seen] *= torch.where(positive, 1 / params.repetition_penalty, params.repetition_penalty)
            scores = (penalised / params.temperature).log_softmax(-1)  # of all tokens, whatever the filters keep
            kept = _filtered(scores.clone(), params).softmax(-1).nan_to_num(1)
            token = int(kept.multinomial(1, generator=draw))
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(scores[token]))})
            ids = [token]
        if tokens[-1] in params.stop_token_ids and not params.include_stop:
            tokens.pop()
        return tokens, logprobs

    def _prefix(self, prompt: list[int]) -> tuple[DynamicCache, int]:
        """A copy of what is known of the prompt's beginning, and its length: never all of it, for it has no logits."""
        for length in range(len(prompt), 0, -1):
            if tuple(prompt[:length]) in self._prefixes:
                cache = copy.deepcopy(self._prefixes[tuple(prompt[:length])])
                known = min(length, len(prompt) - 1)
                cache.crop(known)
                return cache, known
        return DynamicCache(), 0


def _filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    if params.top_k:
        logits = torch.where(logits >= logits.topk(params.top_k).values[-1], logits, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        dropped = order[ordered.cumsum(0) - ordered >= params.top_p]
        logits[dropped] = -torch.inf
    return logits
