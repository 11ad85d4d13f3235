"""Docker's HEALTHCHECK: exit status 0 if the job of this container is well, else 1 and one line that says what is not.

A server has to answer a status request. The actor has to live and to write metrics: after its first PPO step, another
one within HEALTH_MAX_AGE seconds (default 7200; how long a step may take).
"""

import json
import os
import sys
import time
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.servers.transport import ServerError, Transport

_TIMEOUT = 10.0  # seconds for a status request


def check(state: Path) -> str:
    """What the healthy job is doing.

    Raises:
        RuntimeError: it is not healthy.
    """
    try:
        job = json.loads((state / "job.json").read_text())
    except FileNotFoundError:
        return "no job of nemo_eppo was started here"
    if not _alive(job["pid"]):
        raise RuntimeError(f"{job['job']}: process {job['pid']} has ended")
    if job["job"] == "actor":
        return _actor(Path(job["run"]), state / "job.json")
    return _server(job["job"], state / "ready.json")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _actor(run: Path, started: Path) -> str:
    metrics, limit = run / "metrics.jsonl", float(os.environ.get("HEALTH_MAX_AGE", "7200"))
    if not metrics.exists():
        return "actor: starting, or in its first step"
    age = time.time() - max(metrics.stat().st_mtime, started.stat().st_mtime)  # a run that is resumed has an old one
    if age > limit:
        raise RuntimeError(
            f"actor: the last row of {metrics} is {age:.0f} s old, more than HEALTH_MAX_AGE = {limit:.0f}"
        )
    return f"actor: last metrics {age:.0f} s ago"


def _server(job: str, ready: Path) -> str:
    if not ready.exists():
        raise RuntimeError(f"{job}: not serving yet")
    certificates = os.environ.get("NEMO_EPPO_CERTIFICATES")
    try:
        transport = Transport(json.loads(ready.read_text())["url"], Path(certificates) if certificates else None)
        status = transport.request("status", {}, timeout=_TIMEOUT)["status"]
    except (ServerError, ConnectionError, ConfigError) as error:
        raise RuntimeError(f"{job}: {error}") from None
    return f"{job}: serving, {status['step']} updates"


if __name__ == "__main__":
    try:
        print(check(Path(os.environ.get("NEMO_EPPO_STATE", "/tmp/nemo_eppo"))))
    except RuntimeError as error:
        sys.exit(str(error))
