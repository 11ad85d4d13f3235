"""Measures how long the phases of a step take; phases have names and do not overlap."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CLOCK_TOLERANCE = 1e-3  # seconds by which phases may exceed a total that was read from another clock


class Timers:
    """Adds up the seconds of each phase. A phase may be entered several times a step; two phases never overlap.

    Args:
        synchronize: waits for the device. It is called before the clock is read, so that kernels count for the phase
            that launched them.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure a `with` block as `phase`.

        Raises:
            RuntimeError: another phase is running; these seconds would count twice.
        """
        if self._running is not None:
            raise RuntimeError(f"phase {phase!r} starts inside phase {self._running[0]!r}; phases must not overlap")
        self._running = phase, time.perf_counter()
        try:
            self._synchronize()
            start = time.perf_counter()
            yield
            self._synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
        finally:
            self._running = None

    def running(self) -> tuple[str, float] | None:
        """Return the phase that is running, from any thread, and its seconds so far; None between phases."""
        running = self._running
        return (running[0], time.perf_counter() - running[1]) if running else None

    def collect(self, total: float) -> dict[str, float]:
        """Return the phases of a step that took `total` seconds, and forget them.

        Returns:
            `seconds/<phase>` in the order in which the phases began, `seconds/step` = `total`, and
            `seconds/attributed_fraction`, the fraction of `total` inside phases, from 0 to 1.

        Raises:
            RuntimeError: a phase is still running, or the phases together are longer than the step. Then phases of
                an earlier step were not collected, or `total` leaves out a part of this step.
        """
        if self._running is not None:
            raise RuntimeError(f"phase {self._running[0]!r} is still running")
        attributed = sum(self._seconds.values())
        if attributed > total + _CLOCK_TOLERANCE:
            phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self._seconds.items())
            raise RuntimeError(
                f"phases of {attributed:.3f} s in a step of {total:.3f} s ({phases}): timings of an earlier step were "
                "not collected, or the step's clock started late"
            )
        seconds, self._seconds = self._seconds, {}
        return {
            **{f"seconds/{name}": value for name, value in seconds.items()},
            "seconds/step": total,
            "seconds/attributed_fraction": min(attributed / total, 1.0) if total > 0 else 1.0,
        }

    def discard(self) -> None:
        """Forget the phases of a step that failed."""
        self._seconds = {}

    def close(self) -> None:
        """End the measurement after the last step; RuntimeError if some phases were never collected."""
        if self._seconds:
            raise RuntimeError(f"timings were never collected: {', '.join(self._seconds)}")
