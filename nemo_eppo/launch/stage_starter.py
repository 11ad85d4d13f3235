"""Starts the suspended Jobs of a run in Kubernetes, each when those that it needs are complete.

It runs in a pod of its own without GPUs, so that no stage holds GPUs while it waits for another. Its argument is a JSON
object with the names of the Jobs, in their order, and for each of them the names of those that it needs.
"""

import json
import ssl
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Directory in which a pod finds the token of its service account, the API server's authority, and its namespace."""
_POLL_S = 15.0
_PATIENCE_S = 300.0  # how long the API server may not answer


class Jobs:
    """The Jobs of this pod's namespace.

    Args:
        server: URL of the API server.
        account: see ACCOUNT.
    """

    def __init__(self, server: str = "https://kubernetes.default.svc", account: Path = ACCOUNT) -> None:
        namespace = (account / "namespace").read_text().strip()
        self._url, self._account = f"{server}/apis/batch/v1/namespaces/{namespace}/jobs", account
        authority = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(authority)) if server.startswith("https:") else None

    def condition(self, name: str) -> str:
        """Return Complete, Failed, Suspended, or an empty text for another condition of a Job."""
        job = self._ask(name)
        conditions = job.get("status", {}).get("conditions", ())
        types = [condition["type"] for condition in conditions if condition["status"] == "True"]
        return next((kind for kind in ("Complete", "Failed", "Suspended") if kind in types), "")

    def start(self, name: str) -> None:
        """Let a suspended Job run."""
        self._ask(name, {"spec": {"suspend": False}})

    def _ask(self, name: str, patch: Mapping[str, Any] | None = None) -> dict[str, Any]:
        token = (self._account / "token").read_text().strip()  # renewed every hour
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"}
        request = urllib.request.Request(
            f"{self._url}/{name}",
            data=None if patch is None else json.dumps(patch).encode(),
            headers=headers,
            method="GET" if patch is None else "PATCH",
        )
        with urllib.request.urlopen(request, context=self._tls, timeout=30) as answer:
            job: dict[str, Any] = json.load(answer)
            return job


def start_stages(needs: Mapping[str, Sequence[str]], jobs: Jobs, poll: float = _POLL_S) -> None:
    """Start every Job once all that it needs are complete; return when all are complete.

    Raises:
        RuntimeError: a Job failed; those that need it stay suspended.
        OSError: the API server does not answer, or refuses.
    """
    answered = time.monotonic()
    while True:
        try:
            conditions = {name: jobs.condition(name) for name in needs}
            if failed := [name for name, condition in conditions.items() if condition == "Failed"]:
                raise RuntimeError(f"{failed[0]} failed: the stages after it were not started")
            for name, before in needs.items():
                if conditions[name] == "Suspended" and all(conditions[need] == "Complete" for need in before):
                    jobs.start(name)
                    print(f"{name} started", flush=True)
            answered = time.monotonic()
        except OSError as error:
            if time.monotonic() - answered > _PATIENCE_S:
                raise
            print(f"the API server: {error}", file=sys.stderr, flush=True)
            conditions = {}
        if conditions and all(condition == "Complete" for condition in conditions.values()):
            return
        time.sleep(poll)


if __name__ == "__main__":
    try:
        start_stages(json.loads(sys.argv[1]), Jobs())
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
