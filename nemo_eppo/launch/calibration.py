"""Measures the figures of a cluster on this machine: `--estimate here`.

Two processes measure at the same time, as two ranks of a job keep a machine busy, each with matrix products, copies,
and forward passes, updates and decoding by models of two and of six layers; then they sum tensors together. Figures
that this does not show, a request and the host's share of a step, are those of the preset.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_eppo.config import RunError
from nemo_eppo.launch.cluster import H100, Cluster, Fixed, Link
from nemo_eppo.launch.command import THREADS
from nemo_eppo.launch.work import Shape, Work, ring
from nemo_eppo.machine import visible_gpus
from nemo_eppo.settings.model import ModelConfig, ParallelConfig, Precision

if TYPE_CHECKING:
    import torch

_RANKS = 2
_PATIENCE_S = 600
_FEW, _MANY = 2, 6  # layers
_SHORT, _LONG, _ROWS = 8, 96, 24  # tokens of a row, and rows of a large micro-batch
_NEW = 16  # tokens of a response


def measure_here(precisions: set[Precision]) -> Cluster:
    """Measure this machine, with products in each of these precisions.

    Raises:
        RunError: a process fails, or there is one GPU only: the link between two cannot be measured.
    """
    if len(visible_gpus()) == 1:
        raise RunError("--estimate here: measures two GPUs and the link between them, found one")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder, *sorted(precisions)]
        processes = []
        for rank in range(_RANKS):
            command = [sys.executable, "-m", "nemo_eppo.launch.calibration", *arguments]
            with (Path(folder) / f"{rank}.log").open("w") as log:  # a pipe that nobody reads may fill up
                variables = {**os.environ, **THREADS, "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=variables, stderr=log))
        try:
            for process in processes:
                process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise RunError(f"--estimate here: processes that measure took more than {_PATIENCE_S} s") from None
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.returncode:
                message = (Path(folder) / f"{rank}.log").read_text(errors="replace")
                raise RunError(
                    f"--estimate here: a process that measures ended with {process.returncode}: {message[-2000:]}"
                )
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(_RANKS)]
    return Cluster.model_validate(_mean(found))


def _mean(found: list[Any]) -> Any:
    first = found[0]
    if isinstance(first, dict):
        return {key: _mean([one[key] for one in found]) for key in first}
    return sum(found) / len(found) if isinstance(first, float) else first


def _seconds(work: Callable[[], object], least: float = 0.25) -> float:
    """Return the seconds of the fastest call, since other processes only slow calls down: of at least five calls and
    `least` seconds, after two that do not count. On a CPU they are CPU time of the process."""
    from nemo_eppo.megatron import device

    clock, times = time.perf_counter if device.on_gpu() else time.process_time, list[float]()
    for _ in range(2):
        work()
    while sum(times) < least or len(times) < 5:
        device.synchronize()
        start = clock()
        work()
        device.synchronize()
        times.append(clock() - start)
    return min(times)


def _measure(precisions: list[Precision], rank: int, folder: Path) -> Cluster:
    import torch

    from nemo_eppo.megatron import device
    from nemo_eppo.models.numerics import DTYPES

    gpu, where = device.on_gpu(), device.device()
    width, wide, many = (4096, 14336, 4096) if gpu else (256, 1024, 512)
    linear, products = torch.nn.functional.linear, dict[Precision, float]()
    for precision in reversed(precisions):  # ends with the first, which all that follows uses
        weight = torch.randn(wide, width, dtype=DTYPES[precision], device=where)
        rows = torch.randn(many, width, dtype=weight.dtype, device=where)
        products[precision] = 2 * width * wide * many / _seconds(partial(linear, rows, weight))
    large = torch.zeros(2**28 if gpu else 2**24, dtype=torch.uint8, device=where)
    memory = 2 * large.nbytes / _seconds(large.clone)
    if not gpu:  # weights that no cache holds, read for few rows, as in decoding
        cold, few = torch.randn(64, wide, width, dtype=DTYPES[precisions[0]]), rows[:16]
        spent = _seconds(lambda: [linear(few, weight) for weight in cold])
        spent -= 2 * cold.numel() * len(few) / products[precisions[0]]
        memory = min(memory, cold.nbytes / max(spent, 1e-6))
    pinned = torch.zeros(large.numel(), dtype=torch.uint8, pin_memory=gpu)
    host = large.nbytes / _seconds(partial(pinned.copy_, large))
    query = torch.randn(8, 8, 128, width // 8, dtype=DTYPES[precisions[0]], device=where)
    pairs = 8 * 128 * 129 / 2
    attend = torch.nn.functional.scaled_dot_product_attention
    attention = 4 * width * pairs / _seconds(partial(attend, query, query, query, is_causal=True))
    found = Cluster(
        products=products,
        attention=attention,
        memory=memory,
        activations=1.0,
        decoded=1.0,
        host=host,
        overlaps=gpu,
        cores=None if gpu else os.cpu_count(),
        inside=Link(bandwidth=1.0, latency=0.0),
        between=Link(bandwidth=1.0, latency=0.0),
        fixed=H100.fixed,
    )
    seconds = _seconds_of_models(width, precisions[0])
    found = found.model_copy(update={"fixed": _fixed(seconds)})
    link = _link(rank, folder)
    bandwidths = _bandwidths(found, seconds, width, precisions[0])
    return found.model_copy(update={**bandwidths, "inside": link, "between": link})


class _Seconds(NamedTuple):
    """Seconds of passes of models with _FEW and with _MANY layers, by that number."""

    forward: dict[int, float]
    """A forward pass over a short row, by narrow layers."""
    decode: dict[int, float]
    """A token of one response, by narrow layers."""
    train: dict[tuple[int, int], float]
    """An update on that many short rows (the second number), a micro-batch each, by narrow layers."""
    large: dict[int, float]
    """A forward pass over _ROWS long rows, by wide layers."""
    decode_large: dict[int, float]
    """A token of each of _ROWS responses, by wide layers."""


def _model(layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=4 * width,
        num_attention_heads=8,
        vocab_size=64,
        max_sequence_length=_LONG,
    )


def _rows(count: int, length: int) -> "dict[str, torch.Tensor]":
    import torch

    from nemo_eppo.megatron.logprobs import IGNORE

    tokens = torch.randint(64, (count, length))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE
    return {"tokens": tokens, "lengths": torch.full((count,), length), "targets": targets}


def _seconds_of_models(width: int, precision: Precision) -> _Seconds:
    """Measure models with narrow layers, whose passes are nearly all overhead, and with layers of `width` channels."""
    from nemo_eppo.generation.engine import EngineLimits
    from nemo_eppo.generation.megatron_engine import MegatronEngine
    from nemo_eppo.megatron.model import build_model
    from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
    from nemo_eppo.megatron.runner import ModelRunner
    from nemo_eppo.megatron.runtime import initialize, shutdown
    from nemo_eppo.settings.generation import SamplingParams
    from nemo_eppo.settings.training import OptimizerConfig

    def loss(output: "torch.Tensor", _: Any) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
        return -output[..., 0].sum() / 1000, {}

    initialize(ParallelConfig(), seed=1)
    found = _Seconds({}, {}, {}, {}, {})
    limits = EngineLimits(eos_id=0, pad_id=0, max_batch_size=_ROWS, max_sequence_length=_LONG)
    sampling, settings = SamplingParams(max_new_tokens=_NEW, min_new_tokens=_NEW), OptimizerConfig(lr=1e-6)
    for layers in (_FEW, _MANY):
        narrow: Any = build_model(_model(layers, 64), ParallelConfig(), head="lm", precision=precision)
        engine = MegatronEngine(narrow, limits)
        found.decode[layers] = _seconds(partial(engine.generate, [[1]], sampling, [1])) / _NEW
        narrow = wrap_data_parallel(narrow, settings, precision)
        optimizer, scheduler = build_optimizer(narrow, settings, precision, 10_000)
        runner = ModelRunner(narrow, 1, optimizer=optimizer, scheduler=scheduler)
        found.forward[layers] = _seconds(partial(runner.infer, *_rows(1, _SHORT).values(), outputs=2))
        for count in (1, 4):
            found.train[layers, count] = _seconds(partial(runner.train_step, _rows(count, _SHORT), loss), 0.5)

        wide: Any = build_model(_model(layers, width), ParallelConfig(), head="lm", precision=precision)
        engine, runner = MegatronEngine(wide, limits), ModelRunner(wide, _ROWS)
        found.large[layers] = _seconds(partial(runner.infer, *_rows(_ROWS, _LONG).values(), outputs=2))
        response = partial(engine.generate, [[1]] * _ROWS, sampling, list(range(_ROWS)))
        found.decode_large[layers] = _seconds(response) / _NEW
    shutdown()
    return found


def _per_layer(seconds: Mapping[int, float]) -> float:
    return (seconds[_MANY] - seconds[_FEW]) / (_MANY - _FEW)


def _fixed(seconds: _Seconds) -> Fixed:
    """Solve for the seconds of each kind of pass, and of each layer in it, however small they are."""
    layer, layer_decode = _per_layer(seconds.forward), _per_layer(seconds.decode)
    each = {layers: (seconds.train[layers, 4] - seconds.train[layers, 1]) / 3 for layers in (_FEW, _MANY)}
    once = {layers: seconds.train[layers, 1] - each[layers] for layers in (_FEW, _MANY)}  # whatever the micro-batches
    both, layer_update = _per_layer(each), _per_layer(once)
    forward = seconds.forward[_FEW] - _FEW * layer
    solved = {
        "layer": layer,
        "forward": forward,
        "layer_backward": both - layer,
        "backward": each[_FEW] - _FEW * both - forward,
        "layer_update": layer_update,
        "update": once[_FEW] - _FEW * layer_update,
        "layer_decode": layer_decode,
        "decode": seconds.decode[_FEW] - _FEW * layer_decode,
    }
    return H100.fixed.model_copy(update={name: max(0.0, value) for name, value in solved.items()})


def _bandwidths(found: Cluster, seconds: _Seconds, width: int, precision: Precision) -> dict[str, float]:
    """Return the bandwidths of activations and of decoding that explain a wide layer's time beyond its known work."""
    one = Shape(_model(1, width), ParallelConfig(), precision, language=False)
    pass_, step, fixed = one.layers_forward(_ROWS, _LONG), one.decode(_ROWS, _NEW / 2), found.fixed

    def bandwidth(size: float, measured: float, work: Work, launches: float) -> float:
        known = work.products / found.products[precision] + work.attention / found.attention
        known += work.memory / found.memory
        known = max(known, launches) if found.overlaps else known + launches
        return size / max(measured - known, known / 20)  # noise may hide it

    return {
        "activations": bandwidth(pass_.activations, _per_layer(seconds.large), pass_, fixed.layer),
        "decoded": bandwidth(
            _ROWS * one.touched * one.bytes, _per_layer(seconds.decode_large), step, fixed.layer_decode
        ),
    }


def _link(rank: int, folder: Path) -> Link:
    """Bandwidth and latency of sums over two ranks, which come from work, as in a pass: one waits for the other,
    and on a CPU threads of theirs have to wake."""
    import torch
    import torch.distributed as dist

    from nemo_eppo.megatron import device

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        device.distributed_backend(), init_method=f"file://{folder}/store", rank=rank, world_size=_RANKS
    )
    small, large, rows = (torch.zeros(size, device=device.device()) for size in (256, 2**20, (16, 256)))

    def times(tensor: torch.Tensor, count: int) -> list[float]:  # the same count on both ranks
        calls = []
        for _ in range(count):
            for _ in range(4):
                torch.nn.functional.linear(rows, large.view(-1, 256))
            device.synchronize()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            device.synchronize()
            calls.append(time.perf_counter() - start)
        return calls

    few, many = times(small, 200), times(large, 20)
    dist.destroy_process_group()
    latency = sum(few) / len(few)
    return Link(bandwidth=ring(_RANKS) * large.nbytes / max(min(many) - min(few), 1e-9), latency=latency)


def main() -> None:
    """Measure as one of the processes, and write what was found."""
    from nemo_eppo.megatron import device

    folder, *precisions = sys.argv[1:]
    rank = int(os.environ["LOCAL_RANK"])
    device.install()
    device.select()
    figures = _measure(precisions, rank, Path(folder))  # type: ignore[arg-type]
    (Path(folder) / f"{rank}.json").write_text(figures.model_dump_json())


if __name__ == "__main__":
    main()
