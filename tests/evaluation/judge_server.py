"""A local endpoint that judges by a rule, and misbehaves the first time that it is asked something."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-key-that-nobody-may-see"
Rule = Callable[[str, str], str]


def longer(first: str, second: str) -> str:
    """Prefers more words; a position-blind judge."""
    difference = len(first.split()) - len(second.split())
    return "first" if difference > 0 else "second" if difference < 0 else "tie"


class JudgeServer(ThreadingHTTPServer):
    """Answers POST /v1/chat/completions."""

    daemon_threads = True

    def __init__(self, rule: Rule, faults: Sequence[str], delay: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rule, self.faults, self.delay = rule, faults, delay
        self.broken = ""  # a fault that every question but the first two always has
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.arrivals: list[tuple[tuple[str, str, str], float]] = []
        self.answered: Counter[tuple[str, str, str]] = Counter()
        self.waiting = self.most_waiting = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that were killed


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        asked = body["messages"][-1]["content"]
        prompt, first, second = (
            re.search(rf"<{tag}>\n(.*?)\n</{tag}>", asked, re.DOTALL)[1]  # type: ignore[index]
            for tag in ("prompt", "first", "second")
        )
        question = prompt, first, second
        with server.lock:
            before = list(dict.fromkeys(seen for seen, _ in server.arrivals))
            new, number = question not in before, [*before, question].index(question)
            server.requests.append(body)
            server.arrivals.append((question, time.monotonic()))
            server.waiting += 1
            server.most_waiting = max(server.most_waiting, server.waiting)
        time.sleep(server.delay)
        with server.lock:
            server.waiting -= 1
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self._send(401, {"error": {"message": f"bad key {self.headers['Authorization']}"}})
            return
        fault = server.faults[number % len(server.faults)] if server.faults and new else "none"
        fault = server.broken if server.broken and number >= 2 else fault
        verdict = json.dumps({"reason": f"{len(first)} against {len(second)}", "verdict": server.rule(first, second)})
        if fault == "429":
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.7"})
        elif fault == "500":
            self._send(500, {"error": {"message": "oops"}})
        elif fault == "cut":
            self._send(200, _completion(verdict), cut=True)
        elif fault == "no JSON":
            self._send(200, "<html>gateway</html>")
        elif fault == "half":
            self._send(200, _completion(verdict[:20], "length"))
        elif fault == "wrong JSON":
            self._send(200, _completion(f"Sure! {verdict}"))
        elif fault == "wrong verdict":
            self._send(200, _completion('{"reason": "", "verdict": "maybe"}'))
        elif fault == "no content":
            self._send(200, _completion(None, "length"))
        elif fault == "no choices":
            self._send(200, {"choices": [], "usage": None})
        elif fault == "no schemas" and body.get("response_format", {}).get("type") == "json_schema":
            self._send(400, {"error": {"message": "response_format.type must be 'text' or 'json_object'"}})
        else:
            assert fault in ("none", "no schemas")
            with server.lock:
                server.answered[question] += 1
            fenced = f"```json\n{json.dumps({'confidence': 0.9, **json.loads(verdict)}, indent=1)}\n```\n"
            self._send(200, _completion(verdict if fault == "none" else fenced))

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


def _completion(content: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


@contextmanager
def judge_server(rule: Rule = longer, faults: Sequence[str] = (), delay: float = 0.0) -> Iterator[JudgeServer]:
    with JudgeServer(rule, faults, delay) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
