"""The estimate of a step as text: phases and what bounds them, what overlaps, bytes and memory."""

from nemo_eppo.launch.placement import PARTS
from nemo_eppo.launch.step_time import Phase, StepEstimate


def report(estimate: StepEstimate) -> str:
    """Write an estimate as a table for people."""
    lines = [
        f"{estimate.actor}: a step of {_seconds(estimate.seconds)}, "
        f"{estimate.tokens_per_second:,.0f} response tokens a second, predicted",
        f"  {'phase':<22}{'seconds':>10}  {'bound by':<10}" + "".join(f"{part:>10}" for part in PARTS),
    ]
    lines += map(_line, estimate.phases)
    if estimate.servers:
        lines.append("  meanwhile")
        lines += [f"{_line(phase)}  during {phase.during}" for phase in estimate.servers]
    sent = ", ".join(f"{_bytes(size)} {_WIRES[kind]}" for kind, size in estimate.sent.items() if size)
    lines.append(f"  sent in a step by a rank: {sent or 'nothing'}")
    memory = ", ".join(f"{job} {_bytes(size)}" for job, size in estimate.memory.items())
    lines.append(f"  memory of a rank at its peak: {memory}")
    return "\n".join(lines)


_WIRES = {
    "tensor": "to tensor-parallel ranks",
    "stage": "to other stages",
    "replica": "to other replicas",
    "servers": "from and to servers",
}


def _line(phase: Phase) -> str:
    parts = "".join(f"{_seconds(phase.parts[part]) if part in phase.parts else '':>10}" for part in PARTS)
    bound = phase.bound if phase.seconds else ""
    return f"  {phase.name:<22}{_seconds(phase.seconds):>10}  {bound:<10}{parts}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms" if seconds else "0"


def _bytes(size: float) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"
