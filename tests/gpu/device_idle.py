"""The share of each phase of a PPO step in which the device does nothing, as torch's profiler sees it.

The step is that of the benchmark trl_ppo: critic and reward model in the actor's process, which on a GPU leave it for
the host's memory whenever it is not their turn. On a CPU it is the share in which no operator of torch runs.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from checks import passed
from pairs import Options, Row
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from trl_ppo import Work, our_job

from nemo_eppo.megatron import device
from nemo_eppo.observability.timers import Timers

MARK = "phase "
Span = tuple[float, float]


class MarkingTimers(Timers):
    """Timers whose phases the profiler sees."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with super().__call__(phase), record_function(MARK + phase):
            yield


def measure(options: Options) -> Iterator[Row]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.on_gpu() else [])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Work(Path(folder), 2, options.smallest, layers=16, width=1024)
        ppo, prompts = our_job(work, "eppo own_response", stack, **{"model.precision": None})
        ppo.timers = MarkingTimers(device.synchronize)
        ppo.step(1, prompts())
        with profile(activities=activities) as found:
            metrics = ppo.step(2, prompts()).metrics
        phases, busy = spans(found.events())
        for phase, own in phases.items():
            inside = [(max(a, start), min(b, end)) for start, end in own for a, b in busy if a < end and b > start]
            seconds = sum(end - start for start, end in own) / 1e6
            row: Row = {"what": phase, "seconds": seconds, "unprofiled seconds": metrics[f"seconds/{phase}"]}
            yield row | {"idle": 1 - sum(end - start for start, end in inside) / 1e6 / seconds}
        finite = all(abs(value) < float("inf") for value in metrics.values())
        yield passed({"what": "metrics of the step", "found": str(finite)}, "all finite", finite)


def spans(events: Any) -> tuple[dict[str, list[Span]], list[Span]]:
    """When each phase ran, and when the device worked, both in microseconds of the profiler's clock."""
    phases: dict[str, list[Span]] = defaultdict(list)
    busy: list[Span] = []
    wanted = DeviceType.CUDA if device.on_gpu() else DeviceType.CPU
    for event in sorted(events, key=lambda event: event.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        if event.name.startswith(MARK):
            if event.device_type == DeviceType.CPU:  # a GPU has a span of its own for each, from kernel to kernel
                phases[event.name.removeprefix(MARK)].append((start, end))
        elif event.device_type == wanted and not event.is_user_annotation:
            if busy and start <= busy[-1][1]:
                busy[-1] = (busy[-1][0], max(end, busy[-1][1]))
            else:
                busy.append((start, end))
    return dict(phases), busy
