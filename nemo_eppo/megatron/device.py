"""The only module that distinguishes CPU and GPU.

On a GPU machine megatron-core runs untouched. On a CPU it runs with gloo, and `install()` redirects the places where
megatron-core 0.16 names CUDA: it must be called before anything imports `megatron.core`, and raises when a newer
megatron-core has changed a function listed here, so that an upgrade is noticed rather than guessed.
"""

import contextlib
import ctypes
import datetime
import importlib
import inspect
import mmap
import multiprocessing
import os
import shutil
import sys
import sysconfig
import time
import types
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_eppo.megatron.elementwise import norm_of_all, rotation, scale_all, swiglu
from nemo_eppo.processes import serve_parent

CPU = torch.device("cpu")

# Functions of megatron-core 0.16 that hold a device literal ("cuda", "torch.cuda.FloatTensor"), by module.
_DEVICE_LITERALS: dict[str, tuple[str, ...]] = {
    "pipeline_parallel.schedules": (
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ),
    "transformer.utils": ("get_default_causal_mask", "get_sliding_window_causal_mask"),
    "utils": ("local_multi_tensor_l2_norm",),
    "optimizer.clip_grads": ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32", "count_zeros_fp32"),
    "optimizer.optimizer": (
        "MixedPrecisionOptimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "FP32Optimizer.__init__",
    ),
    "optimizer.distrib_optimizer": (
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ),
    "dist_checkpointing.exchange_utils": (
        "_get_empty_tensor_for_exchange",
        "exchange_loaded_tensors_gather_rounds",
    ),
    "dist_checkpointing.strategies.state_dict_saver": ("verify_global_md_reuse",),
}
_REPLACEMENTS = {"cuda": "cpu", **{f"torch.cuda.{t}Tensor": f"torch.{t}Tensor" for t in ("Float", "Half", "BFloat16")}}

_KEPT_BYTES = 2**28  # freed memory that a process on a CPU keeps, and the largest tensor in it


def on_gpu() -> bool:
    """Tell whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this rank: its own GPU, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu() else CPU


def distributed_backend() -> str:
    """Return the torch.distributed backend of the device."""
    return "nccl" if on_gpu() else "gloo"


def select() -> None:
    """Make this rank's device the current one of the process, which takes memory on a GPU."""
    if on_gpu():
        torch.cuda.set_device(device())


def synchronize() -> None:
    """Wait until the device has done all work, so that a timer read next is right."""
    if on_gpu():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Return the free memory in torch's cache to the device, for other processes."""
    if on_gpu():
        torch.cuda.ipc_collect()  # shared memory that no other process has open any more
        torch.cuda.empty_cache()


def locked_memory(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor [size] in pinned host memory; keep it as long as views of it are in use. torch's own pinned
    tensors take the next power of two of bytes."""
    # a shared mapping: private pinned pages would be copied when a checkpoint's writer is forked
    memory = torch.frombuffer(mmap.mmap(-1, max(size, 1) * dtype.itemsize), dtype=dtype)[:size]
    if on_gpu() and size:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
    return memory


def cached_tokens_multiple() -> int:
    """Return the number to a multiple of which a decoding step rounds up the length of its KV cache.

    A GPU's attention kernels plan anew for every length, and copy a mask with unaligned rows; a CPU's do neither.
    """
    return 128 if on_gpu() else 1


def tokens_multiple() -> int:
    """Return the number to a multiple of which a forward pass rounds up the length of its rows, or of its pack.

    A GPU's attention kernels plan anew for every length, and its allocator reuses memory for equal shapes; a CPU would
    only compute more. TransformerEngine rounds a pack's longest row to the same multiple if no length is given.
    """
    return 64 if on_gpu() else 1


def number() -> str:
    """Return this rank's entry of CUDA_VISIBLE_DEVICES or, where that is not set, its GPU's number on the machine."""
    visible, local_rank = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","), int(os.environ.get("LOCAL_RANK", "0"))
    return visible[local_rank] if any(visible[local_rank : local_rank + 1]) else str(local_rank)


def only_these(numbers: list[str]) -> dict[str, str]:
    """Return the environment variables with which a process sees these GPUs only, in this order; none on a CPU."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(numbers)} if on_gpu() else {}


def capacities() -> list[int]:
    """Return the memory of each GPU of this machine, in bytes."""
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def describe() -> list[str]:
    """Return the name and memory of each GPU of this machine, for people."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"{name} ({size / 2**30:.0f} GiB)" for name, size in zip(names, capacities(), strict=True)]


def install() -> None:
    """Make megatron-core usable on this rank's device; nothing on that device is touched.

    Raises:
        RuntimeError: megatron.core was imported before, or a listed function no longer names a CUDA device.
    """
    if on_gpu():
        # TransformerEngine, and torch in NVIDIA's images, would compute fp32 in TF32
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        if not _can_compile():
            warnings.warn("no C compiler with Python's headers: torch.compile fuses nothing", stacklevel=1)
            _disable_jit_fuser()
        _keep_checkpoint_queue("spawn")
        _replace_slow_fallbacks()
        return
    for package in ("transformer_engine", "apex", "triton"):  # Megatron would use their kernels, which need a GPU
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # importing it raises ImportError
    # their warnings advise users of GPUs, on every rank, at every start
    for module in (r"megatron\.core", r"torch\.distributed\.(checkpoint|c10d_logger)"):
        warnings.filterwarnings("ignore", module=module)
    if torch.cuda.Event is _CpuEvent:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("nemo_eppo.megatron.device.install() has to run before megatron.core is imported")
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    _disable_jit_fuser()
    for module_name, functions in _DEVICE_LITERALS.items():
        module = _megatron(module_name)
        for function in functions:
            _rewrite_device_literals(module, function)
    _use_cpu_random_states()
    _keep_freed_memory()
    _keep_checkpoint_queue("fork")
    _skip_reductions_over_one_rank()
    _share_gloo_device()
    _megatron("transformer.mlp").bias_swiglu_impl = swiglu
    _replace_slow_fallbacks()
    # it searches all modules for routers of experts at each update; there are none
    _megatron("distributed.finalize_model_grads").reset_model_temporary_tensors = lambda *args: None
    torch.cuda.Event = _CpuEvent  # type: ignore[assignment, misc]  # set last, because it marks a complete installation


def _megatron(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")


class _CpuEvent:
    """Replaces torch.cuda.Event; CPU work is done when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_CpuEvent") -> float:
        return (end.time - self.time) * 1e3


def _replace_slow_fallbacks() -> None:
    """Replace megatron-core's fallbacks for TransformerEngine and Apex; its norm waits for a GPU at each gradient."""
    rope = _megatron("models.common.embeddings.rope_utils")
    rope._apply_rotary_pos_emb_bshd = rotation(rope._apply_rotary_pos_emb_bshd)
    clip, local = _megatron("optimizer.clip_grads"), _megatron("utils").local_multi_tensor_l2_norm
    if clip.l2_norm_impl is local:
        clip.l2_norm_impl, clip.multi_tensor_scale_impl = norm_of_all, scale_all


def _can_compile() -> bool:
    """Tell whether Triton can compile its kernels' launchers, which are C."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").exists()


def _disable_jit_fuser() -> None:
    # torch.compile at import costs a second and would start a C++ compiler at the first call
    jit: Any = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    sys.modules["megatron.core.jit"] = jit


def _swap(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=_swap(constant.co_consts))
    if isinstance(constant, tuple | frozenset):
        return type(constant)(_swap(item) for item in constant)
    return _REPLACEMENTS.get(constant, constant) if isinstance(constant, str) else constant


def _rewrite_device_literals(module: types.ModuleType, qualified_name: str) -> None:
    # the code object is changed in place, so that every `from x import f` sees it too
    function: Any = module
    for name in qualified_name.split("."):
        function = inspect.getattr_static(function, name)
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = _swap(function.__code__)
    if code.co_consts == function.__code__.co_consts:
        raise RuntimeError(
            f"{module.__name__}.{qualified_name} no longer names a CUDA device: this megatron-core is newer than "
            "nemo_eppo.megatron.device knows; install the version in constraints.txt"
        )
    function.__code__ = code


def _use_cpu_random_states() -> None:
    rng = _megatron("tensor_parallel.random")

    class CpuRNGStatesTracker(rng.CudaRNGStatesTracker):  # type: ignore[name-defined]
        """Keeps megatron-core's named random states for the CPU generator."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = rng._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    rng._CUDA_RNG_STATE_TRACKER, rng._CUDA_RNG_STATE_TRACKER_INITIALIZED = CpuRNGStatesTracker(), True
    # activation recomputation saves the CPU state itself, and there is no other
    rng._get_cuda_rng_state = lambda *args, **kwargs: None
    rng._set_cuda_rng_state = lambda *args, **kwargs: None


def _keep_freed_memory() -> None:
    # glibc gives the activations of every pass back to the kernel, which clears the pages again for the next one: 15 to
    # 20% of a small model's update. A call, because variables of the environment come too late for a forked process.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, _KEPT_BYTES)
        mallopt(mmap_threshold, _KEPT_BYTES)


def _keep_checkpoint_queue(start_method: str) -> None:
    # megatron-core's own manager process ends at torchrun's signal to the group, before the rank's last checkpoint, and
    # outlives a killed rank. Forking it, on a CPU, avoids importing __main__ again, which takes 3 to 10 s.
    writer = _megatron("dist_checkpointing.strategies.filesystem_async")

    def results_queue() -> Any:
        if writer._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(start_method))
            manager.start(serve_parent)
            writer._results_queue = manager.Queue()
        return writer._results_queue

    writer._get_write_results_queue = results_queue


def _skip_reductions_over_one_rank() -> None:
    # megatron-core also reduces over groups of one rank: with gloo's threads, a tenth of a small model's update
    all_reduce = dist.all_reduce

    def reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if not async_op and dist.get_world_size(group) == 1:
            return None
        return all_reduce(tensor, op, group, async_op)

    dist.all_reduce = reduce


def _share_gloo_device() -> None:
    # Megatron makes some 20 groups, and torch a gloo device for each, whose thread wakes 100 times a second.
    gloo: Any = dist.ProcessGroupGloo
    make = gloo.__init__
    devices: dict[int, list[Any]] = {}  # by process id: a forked process has no threads of its parent

    def make_on_shared_device(group: Any, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        if (process := os.getpid()) not in devices:
            devices[process] = [_gloo_device(name) for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")]
        options = gloo._Options()
        options._timeout, options._devices = timeout, devices[process]
        make(group, store, rank, size, options)

    gloo.__init__ = make_on_shared_device


def _gloo_device(interface: str) -> Any:
    gloo = dist.ProcessGroupGloo
    return gloo.create_device(interface=interface) if interface else gloo.create_default_device()
