"""Stands for Ray up to what nemo_eppo uses of it: one cluster of the engine's own, as large as the engine."""

import os
from typing import Any

resources: dict[str, int] = {}


def init(
    *,
    address: str,
    namespace: str,
    num_cpus: int,
    num_gpus: int,
    object_store_memory: int,
    include_dashboard: bool,
    runtime_env: dict[str, dict[str, str]],
    **other: Any,
) -> None:
    assert not resources, "ray.init for a second time"
    assert not other
    assert (address, namespace, include_dashboard) == ("local", "trtllm", False)
    assert os.environ["RAY_memory_monitor_refresh_ms"] == "0"  # noqa: SIM112
    assert runtime_env == {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    assert 75 * 2**20 < object_store_memory < 2**30
    resources.update(cpus=num_cpus, gpus=num_gpus)
