"""Peak memory of actor, critic and reward model, beside the bytes of what they have to hold.

Each is built and does its work of a step, in a process of its own: log-probs, values or rewards, then an update of what
is trained. The peak is that of the process's proportional set size (PSS), or of the tensors on its GPU, above what was
held before. `activations` are the storages that autograd keeps of a micro-batch for its backward pass, weights
excepted; `rest` is what the peak has beyond weights, gradients, optimizer and activations: logits, what operations need
for a moment and what the C library keeps. MiB.
"""

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from distributed import run_ranks
from networks import even_rows, mean_nll, our_runner, shape
from pairs import Options, Row, Spread
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nemo_eppo.megatron import device
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.settings.energy import EnergyProbeConfig

MIB = 2**20
INTERVAL_S = 0.005
"""Seconds between two looks at a process's memory."""
Build = Callable[[], ModelRunner]
Job = Callable[[ModelRunner, Rows], None]


def measure(options: Options) -> list[Row]:
    layers, width, batch, length = (2, 32, 2, 8) if options.smallest else (8, 512, 32, 256)
    model = shape(layers=layers, width=width, vocabulary=8192)
    rows = even_rows(batch, length, model.vocab_size)
    found: list[Row] = []
    for name, (build, work) in jobs(partial(our_runner, model, batch // 2)).items():
        rounds = [alone(build, work, rows) for _ in range(options.rounds)]
        row: Row = {"what": name, **{column: median(one[column] for one in rounds) for column in rounds[0]}}
        peaks = Spread.of([one["peak"] for one in rounds])
        found.append(row | {"peak q1": peaks.low, "peak q3": peaks.high})
    return found


def jobs(build: Callable[..., ModelRunner]) -> dict[str, tuple[Build, Job]]:
    """How each job's model is built, by `build` with further arguments of `our_runner`, and what it does in a step."""
    return {
        "actor": (partial(build, trained=True, probe=EnergyProbeConfig()), actor),
        "critic": (partial(build, head="scalar", trained=True), critic),
        "reward": (partial(build, head="scalar"), values),
    }


def alone(build: Build, work: Job, rows: Rows) -> dict[str, float]:
    """The peak of a process that does nothing else; on a GPU of this one, whose other tensors do not count there."""

    def warm() -> dict[str, float]:
        build()  # what all models share is loaded
        return peak(build, work, rows)

    return warm() if device.on_gpu() else run_ranks(warm, 1)[0]


def peak(build: Build, work: Job, rows: Rows) -> dict[str, float]:
    with watched() as use:
        runner = build()
        work(runner, rows)
    weights = [parameter for chunk in runner.chunks for parameter in chunk.parameters()]
    trained = runner.optimizer is not None
    held = {
        "weights": sum(map(nbytes, weights)) / MIB,
        "gradients": sum(nbytes(weight.main_grad) for weight in weights) / MIB if trained else 0.0,
        "optimizer": optimizer_bytes(runner.optimizer) / MIB if trained else 0.0,
        "activations": activations(runner, work, rows, weights) if trained else 0.0,
    }
    highest = max(use) - use[0]
    return held | {"peak": highest, "rest": highest - sum(held.values()), "peak / weights": highest / held["weights"]}


def actor(runner: ModelRunner, rows: Rows) -> None:
    runner.infer(*rows.values(), outputs=2, energies=True)
    runner.train_step(rows, mean_nll)


def critic(runner: ModelRunner, rows: Rows) -> None:
    values(runner, rows)
    scored = {name: rows[name] for name in ("tokens", "lengths")}
    runner.train_step(scored, lambda output, rows: (output.square().mean(), {}))


def values(runner: ModelRunner, rows: Rows) -> None:
    runner.infer(rows["tokens"], rows["lengths"], outputs=1)


def activations(runner: ModelRunner, work: Job, rows: Rows, weights: list[Any]) -> float:
    """MiB that autograd keeps of one micro-batch, each storage counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        work(runner, {name: column[: len(column) // 2] for name, column in rows.items()})  # of two micro-batches
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    return sum(size for pointer, size in kept.items() if pointer not in own) / MIB


def optimizer_bytes(optimizer: Any) -> int:
    """Moments, and master weights where they are no parameters of the model."""
    states = [
        state for one in getattr(optimizer, "chained_optimizers", [optimizer]) for state in one.optimizer.state.values()
    ]
    return sum(nbytes(value) for state in states for value in state.values() if isinstance(value, Tensor))


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def watched() -> Iterator[list[float]]:
    """MiB in use at the beginning and then, when it is left, at moments of what was done; on a GPU at the peak."""
    gc.collect()
    if device.on_gpu():
        torch.cuda.reset_peak_memory_stats()
        use = [torch.cuda.max_memory_allocated() / MIB]
        yield use
        use.append(torch.cuda.max_memory_allocated() / MIB)
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    use, ended = [pss()], threading.Event()

    def look() -> None:
        while not ended.wait(INTERVAL_S):
            use.append(pss())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield use
    finally:
        ended.set()
        thread.join()
        use.append(pss())


def pss() -> float:
    """MiB of this process, a page that others have too counting as its share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
