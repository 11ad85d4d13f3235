"""Finds this machine's GPUs without torch, whose import takes seconds."""

import os
import shutil
import subprocess
from functools import cache
from itertools import takewhile
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NODES = Path("/dev")


def visible_gpus() -> list[str]:
    """List this machine's GPUs, or those in CUDA_VISIBLE_DEVICES if that is set."""
    if VISIBLE in os.environ:
        names = [gpu.strip() for gpu in os.environ[VISIBLE].split(",")]
        return list(takewhile(lambda gpu: gpu not in ("", "-1", "NoDevFiles"), names))  # CUDA stops at such a name
    return [*_gpus()]


@cache
def _gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:  # as in containers with NVIDIA_DRIVER_CAPABILITIES=compute
        return tuple(str(number) for number, _ in enumerate(_NODES.glob("nvidia[0-9]*")))
    result = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines() if result.returncode == 0 else []
    return tuple(str(number) for number, line in enumerate(lines) if line.startswith("GPU "))
