"""The device layer: megatron-core on a CPU, and loud when megatron-core is not the one it knows."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks

from nemo_eppo.megatron import device
from nemo_eppo.megatron.elementwise import norm_of_all

pytestmark = pytest.mark.skipif(device.on_gpu(), reason="the CPU layer is not installed on a GPU machine")


def test_installing_twice_changes_nothing() -> None:
    before = (torch.cuda.Event, torch.cuda.current_device, torch.Tensor.cuda)
    device.install()
    assert (torch.cuda.Event, torch.cuda.current_device, torch.Tensor.cuda) == before
    assert torch.zeros(2).cuda().device == device.device() == torch.device("cpu")
    assert device.distributed_backend() == "gloo"


@pytest.mark.parametrize(("visible", "number"), [(None, "1"), ("", "1"), ("4,6", "6"), ("4", "1")])
def test_the_number_of_a_ranks_gpu_is_that_of_the_machine(
    visible: str | None, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.number() == number


def test_every_listed_function_makes_cpu_tensors() -> None:
    for name, functions in device._DEVICE_LITERALS.items():
        module = device._megatron(name)
        for function in functions:
            with pytest.raises(RuntimeError, match=rf"{name}\.{function} no longer names a CUDA device"):
                device._rewrite_device_literals(module, function)  # rewritten already


def test_function_that_names_no_cuda_device_is_reported() -> None:
    def changed_upstream() -> torch.Tensor:
        return torch.zeros(1, device="cpu")

    module: Any = types.ModuleType("megatron.core.somewhere")
    module.changed_upstream = changed_upstream
    with pytest.raises(RuntimeError, match=r"somewhere\.changed_upstream no longer names .* install the version"):
        device._rewrite_device_literals(module, "changed_upstream")


def test_literals_are_found_in_methods_and_nested_functions() -> None:
    class Holder:
        def make(self) -> torch.Tensor:
            def inner() -> torch.Tensor:
                return torch.zeros(1, device="cuda")

            return inner()

    module: Any = types.ModuleType("megatron.core.somewhere")
    module.Holder = Holder
    device._rewrite_device_literals(module, "Holder.make")
    assert Holder().make().device.type == "cpu"


def uninstalled() -> Any:
    """The device module as a fresh process sees it, but with megatron.core already imported in this one."""
    spec = importlib.util.find_spec("nemo_eppo.megatron.device")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_megatron_core_imported_too_early_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"install\(\) has to run before megatron\.core is imported"):
        uninstalled().install()


def fail_twice() -> list[str]:
    for name in [name for name in sys.modules if name.startswith("megatron.core")]:
        del sys.modules[name]
    module, said = uninstalled(), []
    module._DEVICE_LITERALS = {"utils": ("divide",)}
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            module.install()
        said.append(str(error.value))
    return said


def test_half_an_installation_is_not_mistaken_for_a_whole_one() -> None:
    first, second = run_ranks(fail_twice, 1)[0]
    assert "megatron.core.utils.divide no longer names a CUDA device" in first
    assert "has to run before megatron.core is imported" in second


def test_on_a_cpu_megatron_takes_no_kernels_that_want_a_gpu(tmp_path: Path) -> None:
    for package in ("transformer_engine", "apex", "triton"):
        (tmp_path / f"{package}.py").write_text("raise RuntimeError('there is no GPU')")
    program = "import nemo_eppo.megatron; from megatron.core import optimizer; print(optimizer.Adam.__module__)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "torch.optim.adamw\n", done.stderr


def test_fp32_is_fp32_on_a_gpu_unless_the_user_wants_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    writer = device._megatron("dist_checkpointing.strategies.filesystem_async")
    monkeypatch.setattr(writer, "_get_write_results_queue", None)
    monkeypatch.setattr(device, "_replace_slow_fallbacks", lambda: None)
    for before, after in ((None, "0"), ("1", "1")):
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
        if before is not None:
            monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", before)
        device.install()
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == after


def test_gradients_are_measured_and_scaled_in_one_call_unless_apex_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, rope = device._megatron("optimizer.clip_grads"), device._megatron("models.common.embeddings.rope_utils")
    monkeypatch.setattr(rope, "_apply_rotary_pos_emb_bshd", rope._apply_rotary_pos_emb_bshd)
    for found, then in ((device._megatron("utils").local_multi_tensor_l2_norm, norm_of_all), (print, print)):
        monkeypatch.setattr(clip, "l2_norm_impl", found)
        device._replace_slow_fallbacks()
        assert clip.l2_norm_impl is then


def test_without_a_compiler_nothing_waits_to_be_compiled_at_its_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("gcc", "Python.h"):
        assert not device._can_compile()
        (tmp_path / name).touch(mode=0o755)
    assert device._can_compile()


def test_named_random_states_leave_the_outer_one_alone() -> None:
    tracker = device._megatron("tensor_parallel.random").get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("here", 5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("here"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with tracker.fork("here"):
        second = torch.rand(3)
    both = torch.rand(6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat([first, second]), both), "a state goes on where it was left"


# torchrun tells the whole process group to end; the rank obeys after its last checkpoint
TOLD_TO_END = """
import multiprocessing, os, signal, sys
if __name__ == "__main__":
    from nemo_eppo.megatron import device
    device._keep_checkpoint_queue(sys.argv[1])
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    queue = device._megatron("dist_checkpointing.strategies.filesystem_async")._get_write_results_queue()
    queue.put("before")
    os.killpg(0, signal.SIGTERM)
    assert queue.get() == "before" and told
    writer = multiprocessing.get_context("fork").Process(target=queue.put, args=("written",))
    writer.start()
    writer.join()
    print(queue.get(timeout=5), queue._manager._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])  # on a CPU, on a GPU
def test_checkpoints_are_written_after_a_signal_to_the_group(start_method: str, tmp_path: Path) -> None:
    script = tmp_path / "told.py"
    script.write_text(TOLD_TO_END)
    command = [sys.executable, str(script), start_method]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120, start_new_session=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    word, process = done.stdout.split()
    assert word == "written"
    for _ in range(50):  # it ends with the job
        if not Path(f"/proc/{process}").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} is left")


def test_locked_memory_is_shared_with_forked_writers() -> None:
    memory = device.locked_memory(5000, torch.bfloat16)
    assert memory.shape == (5000,)
    assert device.locked_memory(0, torch.float32).shape == (0,)
    place = memory.fill_(1.0).data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= place < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert "sh" in line.split()
            return
    raise AssertionError("not found")


# a process of its own: what other tests left on the heap decides how much of it the kernel gets back
FAULTS = """
import resource
import torch
from nemo_eppo.megatron import device
device._keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_freed_tensor_is_the_memory_of_the_next() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 500, "page faults for a tensor of 9,766 pages"
