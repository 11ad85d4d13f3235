"""Checks before a TensorRT-LLM engine starts, and the environment of its process."""

import os
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import device
from nemo_eppo.megatron.runtime import world_size
from nemo_eppo.models.families import family_of
from nemo_eppo.processes import version_there
from nemo_eppo.settings.generation import TensorRTLLMConfig
from nemo_eppo.settings.model import ModelConfig, ParallelConfig

_PACKAGES = Path(__file__).parents[2]  # where the engine's process finds nemo_eppo
# Variables that the engine must not inherit: those of this rank's launcher, which TensorRT-LLM or torch would take for
# their own launcher's, and the trainer's settings of allocator, kernels and threads.
_LAUNCHER = ("PMI", "MPI", "OMPI", "SLURM", "TORCHELASTIC")
_TRAINER = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_KEY = "engine.tensorrt_llm"
_VERSION = "1.2."  # 1.1 has no AsyncLLM, 1.3 other arguments


def engine_environment(config: TensorRTLLMConfig, gpus: list[str]) -> dict[str, str]:
    """Return the environment of the engine's process, which sees these entries of CUDA_VISIBLE_DEVICES."""
    foreign = (*_RANK, *_TRAINER)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER) and k not in foreign}
    paths = [config.environment.get("PYTHONPATH"), str(_PACKAGES), os.environ.get("PYTHONPATH")]
    return {
        **inherited,
        **device.only_these(gpus),
        "TLLM_DISABLE_MPI": "1",  # read when tensorrt_llm is imported
        "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "1",
        "TLLM_RAY_FORCE_LOCAL_CLUSTER": "1",  # each engine has workers of its own
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers when the trainer fills the host's memory
        **config.environment,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def check_tensorrt_llm(config: TensorRTLLMConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
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
            f"{_KEY}.tensor_parallel_size = {size}: expected a divisor of {ranks}, the ranks of a replica of the actor"
        )
    for name, value in (("num_attention_heads", model.num_attention_heads), ("num_query_groups", model.kv_heads)):
        if value % size:
            raise ConfigError(f"{_KEY}.tensor_parallel_size = {size}: the model's {name} = {value} is not divisible")
    world, here = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for engine in engines(parallel, world, size):
        if len({rank // here for rank in engine}) > 1:
            raise ConfigError(
                f"{_KEY}.tensor_parallel_size = {size}: expected engines within one machine, which runs {here} ranks; "
                f"ranks {', '.join(map(str, engine))} would make one"
            )
    if not device.number().isdigit():  # its Ray workers read CUDA_VISIBLE_DEVICES as integers
        raise ConfigError(
            f"engine.name = 'tensorrt_llm': CUDA_VISIBLE_DEVICES has to hold numbers, not {device.number()}"
        )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").replace(" ", "").lower():
            raise ConfigError(
                f"engine.name = 'tensorrt_llm': {name} = {os.environ[name]!r}, whose memory cannot be shared with the "
                "engine's workers; take expandable_segments out of it"
            )
    python = config.interpreter
    try:
        found = version_there("tensorrt_llm", python, engine_environment(config, []))
    except OSError as error:
        raise ConfigError(f"{_KEY}.python = {python!r} cannot be run: {error}") from None
    if not found.startswith(_VERSION):
        raise ConfigError(
            f"engine.name = 'tensorrt_llm': {python} has "
            f"{f'tensorrt_llm {found}' if found else 'no package tensorrt_llm'}. Install tensorrt_llm 1.2 and ray 2.54 "
            f"into an environment of their own and set {_KEY}.python to its Python, as docker/Dockerfile's target "
            "tensorrt_llm does, or use engine.name = 'megatron'"
        )


def engines(parallel: ParallelConfig, world: int, size: int) -> list[list[int]]:
    """Return the ranks of each engine; Megatron counts them over tensor, then data, then pipeline parallelism."""
    tensor, replicas = parallel.tensor_model_parallel_size, parallel.data_parallel_size(world)
    ranks_of_engines = []
    for replica in range(replicas):
        stages = [(stage * replicas + replica) * tensor for stage in range(parallel.pipeline_model_parallel_size)]
        ranks = [first + rank for first in stages for rank in range(tensor)]
        ranks_of_engines += [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return ranks_of_engines
