"""Parents, children and their environment (Linux)."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # options of prctl
_libc = ctypes.CDLL(None)


def end_with_parent(signal_number: int) -> None:
    """Let the kernel send this process a signal as soon as its parent is gone, even if that was killed."""
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal_number)


def serve_parent() -> None:
    """Live exactly as long as the parent: ignore signals to the whole process group, on which the parent decides."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants of this process whose own parents end."""
    _libc.prctl(_SET_CHILD_SUBREAPER, 1)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables during a `with` block, for the processes that it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def version_there(package: str, python: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the version of a package of another Python; "" if it has none, OSError if it cannot be run."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    result = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return result.stdout.strip()
