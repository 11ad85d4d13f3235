"""In Kubernetes, a stage is started when those before it are complete, and not if one of them failed."""

import http.server
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nemo_eppo.launch.stage_starter import Jobs, start_stages


class Cluster(http.server.BaseHTTPRequestHandler):
    """An API server whose Jobs are complete, or fail, the second time that they are seen running."""

    jobs: ClassVar[dict[str, str]]
    fails: ClassVar[str]
    started: ClassVar[list[str]]

    def do_GET(self) -> None:
        name = self._name()
        seen = self.jobs[name]
        self._answer({"status": {"conditions": [{"type": seen, "status": "True"}] if seen else []}})
        if not seen:
            self.jobs[name] = "Failed" if name == self.fails else "Complete"

    def do_PATCH(self) -> None:
        name = self._name()
        assert json.loads(self.rfile.read(int(self.headers["Content-Length"]))) == {"spec": {"suspend": False}}
        self.started.append(name)
        self.jobs[name] = ""
        self._answer({})

    def _name(self) -> str:
        path, _, name = self.path.rpartition("/")
        assert path == "/apis/batch/v1/namespaces/mine/jobs"
        assert self.headers["Authorization"] == "Bearer secret"
        return name

    def _answer(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.mark.parametrize("fails", ["", "rm"])
def test_a_stage_starts_when_those_before_it_are_complete(fails: str, tmp_path: Path) -> None:
    (tmp_path / "namespace").write_text("mine\n")
    (tmp_path / "token").write_text("secret")
    Cluster.jobs, Cluster.fails = {"sft": "", "rm": "Suspended", "actor": "Suspended"}, fails
    Cluster.started = []
    needs = {"sft": [], "rm": ["sft"], "actor": ["sft", "rm"]}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cluster) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        jobs = Jobs(f"http://127.0.0.1:{server.server_port}", tmp_path)
        try:
            with pytest.raises(RuntimeError, match="rm failed: ") if fails else nullcontext():
                start_stages(needs, jobs, poll=0.01)
        finally:
            server.shutdown()
    assert Cluster.started == (["rm"] if fails else ["rm", "actor"])
