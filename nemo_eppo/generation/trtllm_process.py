"""The process of a TensorRT-LLM engine: AsyncLLM behind a socket. `TensorRTLLMEngine` starts it and talks to it.

All code that uses TensorRT-LLM's API is here and in `trtllm_worker`. It follows the sources of version 1.2
(llmapi/llm_args.py, _torch/async_llm.py, _torch/virtual_memory.py, executor/ray_executor.py, llmapi/rlhf_utils.py) and
has not been run with it: tests run it with a package that has the same signatures (tests/generation/stand_in).

It imports only torch, the standard library and, when it starts, tensorrt_llm and ray: it may run in an environment of
its own. A request is (command, arguments), its answer ("done", result) or ("failed", kind of error, message).
"""

import asyncio
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from nemo_eppo.generation.refit import Bucket, Receiver, RefitError, TensorInfo

_CACHE = ["kv_cache"]
# All other memory of 1.2 that can be released (ExecutorMemoryType; its members "_no_capture_*" cannot). While the
# engine sleeps, its contents are kept in pinned host memory (RestoreMode.PINNED).
_ALL_BUT_CACHE = [
    "model",
    "draft_model",
    "sampler",
    "drafter",
    "guided_decoder",
    "spec_resource_manager",
    "model_extra",
    "executor_extra",
]


class EngineServer:
    """Answers the requests of the engine's ranks. It sleeps, without GPU memory, until the first refit.

    Args:
        model: Hugging Face directory, of which only settings are read; the weights come with the first refit.
        gpus: number of the engine's GPUs, all that this process sees.
        expected: name, shape and dtype of every tensor of a refit.
        pad_id: token id of the tokenizer.
        free_gpu_memory_fraction: share of the free GPU memory that the KV cache takes.
        max_seq_len: longest prompt and response together, in tokens.
        max_batch_size: sequences decoded at once.
        max_num_tokens: tokens computed at once.
    """

    def __init__(
        self,
        model: str,
        gpus: int,
        expected: list[TensorInfo],
        pad_id: int,
        free_gpu_memory_fraction: float,
        max_seq_len: int,
        max_batch_size: int,
        max_num_tokens: int,
    ) -> None:
        import ray
        from tensorrt_llm import AsyncLLM, SamplingParams
        from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

        # AsyncLLM uses this Ray instead of starting one that takes the whole machine for its own. Workers ask for a GPU
        # and a CPU each, and choose the GPU themselves; hardly anything passes through Ray's object store.
        ray.init(
            address="local",
            namespace="trtllm",
            num_cpus=gpus,
            num_gpus=gpus,
            object_store_memory=2**28,
            include_dashboard=False,
            runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}},
        )
        self._sampling_params, self._pad_id = SamplingParams, pad_id
        self._receiver = Receiver(expected)
        self._released: set[str] = set()
        self._has_reported_unchecked = False  # the tensors whose loading is not checked
        self._llm = AsyncLLM(
            model=model,
            backend="pytorch",
            load_format="dummy",
            tensor_parallel_size=gpus,
            kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=free_gpu_memory_fraction, enable_block_reuse=True),
            # without padding only batches of 1 to 31, 32, 64 or 128 would run as graphs
            cuda_graph_config=CudaGraphConfig(enable_padding=True, max_batch_size=max_batch_size),
            sampler_type="TRTLLMSampler",  # in 1.2 the one that knows each request's seed
            ray_worker_extension_cls="nemo_eppo.generation.trtllm_worker.RefitWorker",
            enable_sleep=True,
            max_seq_len=max_seq_len,
            max_input_len=max_seq_len - 1,  # else 1024
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            enable_chunked_prefill=max_seq_len > max_num_tokens,  # else prompts beyond max_num_tokens are refused
        )

    async def setup(self) -> None:
        """Start the workers, and put them to sleep."""
        await self._llm.setup_async()
        await self.release()

    async def begin(self, version: int) -> None:
        """Start the refit to `version`: allocate memory for the weights."""
        self._receiver.begin(version)
        await self._take(_ALL_BUT_CACHE)

    async def bucket(self, bucket: Bucket, handles: list[str]) -> None:
        """Load the tensors in every GPU's shared buffer, and check their digests."""
        self._receiver.expect(bucket)
        self._receiver.check(bucket, _infos(await self._on_workers("load_bucket", handles)))

    async def finish(self, version: int) -> None:
        """End a refit after its last bucket, and check that it has changed the weights; drops the prefix cache."""
        self._receiver.finish(version)
        await self._on_workers("update_weights", None)
        unchecked = self._receiver.confirm(_infos(await self._on_workers("own_tensors")))
        if unchecked and not self._has_reported_unchecked:
            print(
                f"TensorRT-LLM has no tensors of the names of {len(unchecked)} that it was given, {unchecked[0]} "
                "for one: whether it loads them is not checked",
                flush=True,
            )
            self._has_reported_unchecked = True

    async def take_cache(self) -> None:
        """Allocate the KV cache, which is empty."""
        await self._take(_CACHE)

    async def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        try:
            results: list[Any] = await self._llm.collective_rpc(method, args=arguments)
        except BaseException:
            self._receiver.forget()
            raise
        return results

    async def _take(self, tags: list[str]) -> None:
        if wanted := [tag for tag in tags if tag in self._released]:
            await self._llm.resume(wanted)
            self._released -= set(wanted)

    async def generate(
        self, requests: list[tuple[list[int], dict[str, Any]]]
    ) -> tuple[int, list[tuple[list[int], list[float]]]]:
        """Return the version of the weights, and tokens and log-probs for each (prompt, sampling parameters)."""
        version = self._receiver.version
        if version is None:
            raise RefitError("the engine has no weights: the last refit failed, or there was none since it slept")
        outputs = await asyncio.gather(*[self._answer(prompt, sampling) for prompt, sampling in requests])
        return version, outputs

    async def _answer(self, prompt: list[int], sampling: dict[str, Any]) -> tuple[list[int], list[float]]:
        params = self._sampling_params(
            **sampling,
            end_id=-1,
            pad_id=self._pad_id,
            include_stop_str_in_output=True,
            detokenize=False,
            logprobs=1,
        )
        result = await self._llm.generate_async(inputs=prompt, sampling_params=params)
        output = result.outputs[0]
        tokens = list(output.token_ids)
        logprobs = [float(choices[token].logprob) for token, choices in zip(tokens, output.logprobs, strict=True)]
        return tokens, logprobs

    async def release(self) -> None:
        """Free the memory of weights, graphs and KV cache."""
        self._receiver.forget()
        if wanted := [tag for tag in _ALL_BUT_CACHE + _CACHE if tag not in self._released]:
            await self._llm.release(wanted)
            self._released |= set(wanted)


def _infos(described: list[Any]) -> list[list[TensorInfo]]:
    """Read what each worker has described; Ray may bring named tuples as tuples."""
    return [[TensorInfo(*info) for info in infos] for infos in described]


_COMMANDS = ("begin", "bucket", "finish", "take_cache", "generate", "release")


async def serve(connection: Connection) -> None:
    """Answer requests until the other side closes; the first one is ("start", arguments of EngineServer)."""
    server: EngineServer | None = None
    loop = asyncio.get_running_loop()
    while True:
        try:
            command, arguments = await loop.run_in_executor(None, connection.recv)
        except (EOFError, OSError):
            return
        try:
            if server is None:
                server = EngineServer(**arguments)
                await server.setup()
                answer: tuple[Any, ...] = ("done", None)
            elif command in _COMMANDS:
                answer = ("done", await getattr(server, command)(**arguments))
            else:
                raise ValueError(f"unknown command {command!r}")
        except Exception as error:
            traceback.print_exc()  # into the log
            answer = ("failed", type(error).__name__, str(error))
        connection.send(answer)


if __name__ == "__main__":
    asyncio.run(serve(Connection(int(sys.argv[1]))))
