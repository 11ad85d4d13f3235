"""Checks whether this machine can run jobs: interpreter, packages, accelerators, shared memory, open files."""

import ctypes
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nemo_eppo.launch.findings import Finding, error, ok, warning
from nemo_eppo.machine import visible_gpus
from nemo_eppo.processes import version_there
from nemo_eppo.settings.generation import PYTHON, TensorRTLLMConfig

_SHARED_MEMORY = 1 << 30  # bytes that PyTriton and NCCL need
_OPEN_FILES = 4096  # files that a process should be able to open


def packages() -> Iterator[Finding]:
    """Check Python and every requirement in this package's metadata."""
    metadata = importlib.metadata.metadata("nemo_eppo")
    python, wanted = ".".join(map(str, sys.version_info[:3])), metadata["Requires-Python"]
    if SpecifierSet(wanted).contains(python):
        yield ok("Python", python)
    else:
        yield error("Python", python, f"expected {wanted}")
    good = []
    for line in importlib.metadata.requires("nemo_eppo") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield error(f"package {requirement.name}", "not installed", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good.append(f"{requirement.name} {version}")
        else:
            yield error(f"package {requirement.name}", version, f"expected {requirement.specifier}")
    yield ok("packages", f"{len(good)} of the versions wanted, among them {', '.join(good[:3])}")
    found = "installed" if importlib.util.find_spec("transformer_engine") else "not installed"
    yield ok("optional transformer_engine", f"{found} (faster layers on GPUs)")
    python = TensorRTLLMConfig().interpreter
    try:
        found = version_there("tensorrt_llm", python) or "not installed"
    except OSError as trouble:
        yield warning(
            "optional tensorrt_llm", f"{PYTHON}={python}: {trouble}", "expected a Python that has tensorrt_llm"
        )
        return
    yield ok("optional tensorrt_llm", f"{found} in {python} (faster generation on GPUs)")


def triton() -> Iterator[Finding]:
    """Check that the library that PyTriton's helpers load by name is found."""
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    for path in (f"{sysconfig.get_config_var('LIBDIR')}/{name}", name):
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        yield ok("libpython for PyTriton", path)
        return
    yield error(
        "libpython for PyTriton", "not found", f"servers need {name}: install the package libpython of your system"
    )


def accelerators() -> Iterator[Finding]:
    """List the GPUs that torch finds; torch, whose import takes seconds, is not imported if there are none."""
    here = visible_gpus()
    if not here:
        yield ok("GPUs", "none: jobs run on the CPU with gloo")
        return
    from nemo_eppo.megatron import device

    if found := device.describe():
        yield ok("GPUs", "; ".join(found))
    else:
        torch = f"torch {importlib.metadata.version('torch')}"
        text = f"{len(here)} here, {torch} finds none: jobs run on the CPU"
        yield warning("GPUs", text, "see nvidia-smi, and install torch for its CUDA")


def resources() -> Iterator[Finding]:
    """Check shared memory and how many files a process may open: ranks raise their limit to what the machine allows."""
    shared = shutil.disk_usage("/dev/shm")
    text = f"{shared.free / 2**30:.1f} GiB free of {shared.total / 2**30:.1f} in /dev/shm"
    if shared.free < _SHARED_MEMORY:
        yield warning(
            "shared memory", text, "servers and NCCL want 1 GiB or more: docker run --ipc=host, or --shm-size"
        )
    else:
        yield ok("shared memory", text)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        yield warning("open files", f"at most {hard}", f"raise the hard limit (ulimit -Hn) to {_OPEN_FILES}")
    else:
        yield ok("open files", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def disk(directory: Path, needed: int) -> Finding:
    """Check that a directory, which may not exist yet, can be written and has room for `needed` bytes."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return error("disk", f"{existing} cannot be written to", "choose another output")
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB free at {existing}, {needed / 2**30:.1f} needed for checkpoints"
    return ok("disk", text) if free >= needed else error("disk", text, "free space, or lower checkpoint.keep")
