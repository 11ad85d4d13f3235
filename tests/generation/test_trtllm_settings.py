"""What TensorRT-LLM is told: the stand-in refuses what version 1.2 would."""

import base64
import os
import pickle
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from engines import STAND_IN, stand_in, trtllm_engine
from small_models import MODEL, build_policy, random_prompts, random_weights

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.generation import ipc
from nemo_eppo.generation.trtllm_checks import check_tensorrt_llm, engine_environment
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.generation import PYTHON, SamplingParams, TensorRTLLMConfig
from nemo_eppo.settings.model import ParallelConfig

LONG = MODEL.model_copy(update={"max_sequence_length": 1200})
PROMPTS = random_prompts([1100, 300, 5])


def answer_long_prompts(directory: Path) -> tuple[list[Completion], float]:
    """The answers; and how many seconds the engine takes to end while a child of this process has its files open."""
    config = stand_in(max_num_tokens=256, max_batch_size=200)
    engine = trtllm_engine(build_policy({}, LONG), directory, LONG, config)
    engine.refit(iter(random_weights(LONG).items()), 1)
    completions = engine.generate(PROMPTS, SamplingParams(max_new_tokens=2), [0, 1, 2])
    child = os.fork()
    if not child:
        time.sleep(100)
        os._exit(0)
    started = time.monotonic()
    engine.close()
    seconds = time.monotonic() - started
    os.kill(child, signal.SIGKILL)
    return completions, seconds


def test_prompts_may_be_longer_than_tensorrt_llms_defaults_and_than_what_it_computes_at_once(tmp_path: Path) -> None:
    completions, seconds = run_ranks(answer_long_prompts, 1, tmp_path)[0]
    assert [len(completion.token_ids) > 0 for completion in completions] == [True] * 3
    assert seconds < 20, "the process was waited for in vain, and killed"


def test_the_engines_process_gets_nothing_that_was_meant_for_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "SLURM_NTASKS", "RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "/models")
    got = engine_environment(TensorRTLLMConfig(environment={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}), [])
    assert not {"PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "SLURM_NTASKS", "RANK"} & got.keys()
    assert (got["HF_HOME"], got["NCCL_DEBUG"], got["OMP_NUM_THREADS"]) == ("/models", "INFO", "4")
    assert (got["TLLM_DISABLE_MPI"], got["RAY_memory_monitor_refresh_ms"]) == ("1", "0")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_that_cannot_be_shared_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = partial(check_tensorrt_llm, TensorRTLLMConfig(), MODEL, ParallelConfig())
    monkeypatch.setenv(name, "max_split_size_mb:512, Expandable_Segments : True")
    with pytest.raises(ConfigError, match=f"{name} = .* whose memory cannot be shared with the engine's workers"):
        check()
    monkeypatch.setenv(name, "expandable_segments:False")
    said = ""
    try:
        check()
    except ConfigError as error:  # there may be no TensorRT-LLM
        said = str(error)
    assert name not in said


def echo(*arguments: Any) -> tuple[Any, ...]:
    return arguments


@pytest.mark.parametrize(("written", "read"), [(b"\x03c", b"\x02c"), (b"\x02c", b"\x02c"), (b"\x03e", b"\x03e")])
def test_handles_of_a_newer_torch_are_read_by_an_older_one(written: bytes, read: bytes) -> None:
    memory = bytes(range(64))
    arguments = (*range(6), "device", written + memory, *range(7))
    text = base64.b64encode(pickle.dumps([("w", (echo, arguments))])).decode()
    [(name, opened)] = ipc.open_handles(text, 5)
    assert (name, opened) == ("w", (*range(6), 5, read + memory, *range(7)))


def test_the_python_is_that_of_the_settings_else_of_the_image_else_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    assert TensorRTLLMConfig().interpreter == sys.executable
    monkeypatch.setenv(PYTHON, "/opt/tensorrt_llm/bin/python")
    assert TensorRTLLMConfig().interpreter == "/opt/tensorrt_llm/bin/python"
    assert TensorRTLLMConfig(python=STAND_IN).interpreter == str(STAND_IN)


def test_a_batch_of_more_sequences_than_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_num_tokens = 100: expected at least max_batch_size = 256, a token of"):
        load_config(TensorRTLLMConfig, {"max_num_tokens": 100})
