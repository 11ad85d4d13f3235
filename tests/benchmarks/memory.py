"""Peak resident memory of actor, critic and reward model, beside the bytes of what they have to hold.

Each is built and does its work of a step: log-probs, values or rewards, then an update of what is trained. The peak is
that of the process, or of the tensors on its GPU, above what was held before; `rest` is what the peak has beyond
weights, gradients and optimizer: activations, logits and what the C library keeps. MiB.
"""

import ctypes
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import even_rows, mean_nll, our_runner, shape
from pairs import Options, Row
from torch import Tensor

from nemo_eppo.megatron import device
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.settings.energy import EnergyProbeConfig

MIB = 2**20
Build = Callable[[], ModelRunner]


def measure(options: Options) -> list[Row]:
    layers, width, batch, length = (2, 32, 2, 8) if options.smallest else (8, 512, 32, 256)
    model = shape(layers=layers, width=width, vocabulary=8192)
    rows = even_rows(batch, length, model.vocab_size)
    build = partial(our_runner, model, batch // 2)
    build()  # what all models share is loaded
    return [{"what": name, **peak(*part)} for name, part in jobs(build, rows).items()]


def jobs(build: Callable[..., ModelRunner], rows: Rows) -> dict[str, tuple[Build, Callable[[ModelRunner], None]]]:
    """How each job's model is built, by `build` with further arguments of `our_runner`, and what it does in a step."""
    scored = {name: rows[name] for name in ("tokens", "lengths")}
    return {
        "actor": (partial(build, trained=True, probe=EnergyProbeConfig()), partial(actor, rows)),
        "critic": (partial(build, head="scalar", trained=True), partial(critic, scored)),
        "reward": (partial(build, head="scalar"), partial(values, scored)),
    }


def peak(build: Build, work: Callable[[ModelRunner], None]) -> dict[str, float]:
    gc.collect()
    before = highest_use(restart=True)
    runner = build()
    work(runner)
    highest = highest_use() - before
    weights = [parameter for chunk in runner.chunks for parameter in chunk.parameters()]
    trained = runner.optimizer is not None
    held = {
        "weights": sum(map(nbytes, weights)) / MIB,
        "gradients": sum(nbytes(weight.main_grad) for weight in weights) / MIB if trained else 0.0,
        "optimizer": optimizer_bytes(runner.optimizer) / MIB if trained else 0.0,
    }
    return held | {"peak": highest, "rest": highest - sum(held.values()), "peak / weights": highest / held["weights"]}


def actor(rows: Rows, runner: ModelRunner) -> None:
    runner.infer(*rows.values(), outputs=2, energies=True)
    runner.train_step(rows, mean_nll)


def critic(rows: Rows, runner: ModelRunner) -> None:
    values(rows, runner)
    runner.train_step(rows, lambda output, rows: (output.square().mean(), {}))


def values(rows: Rows, runner: ModelRunner) -> None:
    runner.infer(*rows.values(), outputs=1)


def optimizer_bytes(optimizer: Any) -> int:
    """Moments, and master weights where they are no parameters of the model."""
    states = [
        state for one in getattr(optimizer, "chained_optimizers", [optimizer]) for state in one.optimizer.state.values()
    ]
    return sum(nbytes(value) for state in states for value in state.values() if isinstance(value, Tensor))


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def highest_use(*, restart: bool = False) -> float:
    """MiB at the peak so far; `restart` makes it the present use."""
    if device.on_gpu():
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / MIB
    if restart:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmHWM")


def status(field: str) -> float:
    """MiB of this process, as the kernel counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
