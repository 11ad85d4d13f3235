"""The process of a TensorRT-LLM engine: AsyncLLM behind a socket. `TensorRTLLMEngine` starts it and talks to it.

All code that uses TensorRT-LLM's API is here. It follows the documentation and sources of version 1.2 and has not been
run with it: tests run it with a package that has the same signatures (tests/generation/stand_in).

It imports only torch, the standard library and, when it starts, tensorrt_llm: it may run in an environment of its own.
A request is (command, arguments), its answer ("done", result) or ("failed", kind of error, message).
"""

import asyncio
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from nemo_eppo.generation.ipc import open_handles
from nemo_eppo.generation.refit import Bucket, Receiver, RefitError, TensorInfo

_RELEASED = ["model", "kv_cache"]  # memory given to training


class EngineServer:
    """Answers the requests of the engine's ranks.

    Args:
        model: Hugging Face directory, of which only settings are read; the weights come with the first refit.
        devices: uuids of the engine's GPUs, in the order in which this process sees them.
        expected: name, shape and dtype of every tensor of a refit.
        pad_id: token id of the tokenizer.
        arguments: further arguments of AsyncLLM.
        free_gpu_memory_fraction: share of the free GPU memory that the KV cache takes.
    """

    def __init__(
        self,
        model: str,
        devices: list[str],
        expected: list[tuple[str, tuple[int, ...], str]],
        pad_id: int,
        arguments: dict[str, Any],
        free_gpu_memory_fraction: float,
    ) -> None:
        from tensorrt_llm import AsyncLLM, SamplingParams
        from tensorrt_llm.llmapi import KvCacheConfig

        self._sampling_params = SamplingParams
        self._devices, self._pad_id = devices, pad_id
        self._receiver = Receiver([TensorInfo(*info) for info in expected])
        self._llm = AsyncLLM(
            model=model,
            backend="pytorch",
            load_format="dummy",
            tensor_parallel_size=len(devices),
            kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=free_gpu_memory_fraction, enable_block_reuse=True),
            sampler_type="TRTLLMSampler",  # in 1.2 the one that knows each request's seed
            enable_sleep=True,
            **arguments,
        )

    async def setup(self) -> None:
        """Start the workers."""
        await self._llm.setup_async()

    async def begin(self, version: int) -> None:
        """Start the refit to `version`."""
        self._receiver.begin(version)

    async def bucket(
        self, header: tuple[int, int, list[tuple[Any, ...]]], to_check: dict[str, str], to_load: dict[str, str]
    ) -> None:
        """Check the tensors in every device's shared buffer, and load them; either use needs its own handles."""
        version, number, tensors = header
        copies = [open_handles(text, index) for index, text in enumerate(to_check.values())]
        self._receiver.check(Bucket(version, number, [TensorInfo(*info) for info in tensors]), copies)
        del copies
        await self._load(to_load)

    async def finish(self, version: int) -> None:
        """End a refit after its last bucket; this also drops the prefix cache."""
        self._receiver.finish(version)
        await self._load(None)

    async def _load(self, handles: dict[str, str] | None) -> None:
        try:
            await self._llm.update_weights(handles)
        except BaseException:
            self._receiver.forget()
            raise

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
        """Free the memory of weights and KV cache."""
        self._receiver.forget()
        await self._llm.release(_RELEASED)

    async def resume(self) -> None:
        """Take that memory again; its content is lost."""
        await self._llm.resume(_RELEASED)


_COMMANDS = ("begin", "bucket", "finish", "generate", "release", "resume")


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
