"""A chat endpoint on 127.0.0.1 for the judge's tests: real HTTP, every request counted, misbehaving on demand."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: (status, headers, body); a body that is not bytes becomes JSON
Reply = tuple[int, dict[str, str], Any]


def completion(words: str | None) -> Reply:
    return 200, {}, {"choices": [{"index": 0, "message": {"role": "assistant", "content": words}}]}


class ChatServer:
    """``respond(question, n)`` makes the reply to the n-th request (from 0) that asks this question.

    Attributes:
        requests: bodies and paths, in order. asked: requests for each question. answered: those that got a 200.
        keys: Authorization headers seen.
        hold_after: once so many are answered, requests wait without an answer; ``waiting`` is how many do.
    """

    def __init__(self, respond: Callable[[str, int], Reply]) -> None:
        self.respond = respond
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.keys: list[str | None] = []
        self.requests: list[dict[str, Any]] = []
        self.release = threading.Event()
        self.hold_after: int | None = None
        self.waiting = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server._serve(self)

            def do_GET(self) -> None:
                """What a followed redirect would become."""
                server.keys.append(self.headers["Authorization"])
                self.send_error(405)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self._lock:
            n = self.asked[question]
            self.asked[question] += 1
            self.keys.append(handler.headers["Authorization"])
            self.requests.append({"path": handler.path, **body})
            held = self.hold_after is not None and self.answered.total() >= self.hold_after
            self.waiting += held
        if held:
            self.release.wait(60)
            return  # its client is dead
        status, headers, content = self.respond(question, n)
        with self._lock:
            self.answered[question] += status == 200
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except BrokenPipeError:
            pass  # the client was killed

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
