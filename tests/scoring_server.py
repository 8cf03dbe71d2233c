"""A server on 127.0.0.1 that scores with a tiny model, in vLLM's or in SGLang's format: real HTTP, misbehaving on demand."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

#: (status, headers, body); a body that is not bytes becomes JSON
Reply = tuple[int, dict[str, str], Any]


class ScoringServer:
    """``spoil(answer, n)`` makes another reply of what answers the n-th request (from 0) to score; None leaves it.

    Attributes:
        model, root: may be replaced while it runs.
        texts: how often each text, a tuple of ids, was scored. bodies: of all requests to score.
        keys: Authorization headers seen.
        hold_after: once so many texts are scored, requests wait without an answer, and ``held`` is written.
    """

    def __init__(self, folder: str, kind: str = "vllm", name: str = "tiny", max_model_len: int = 512) -> None:
        self.kind, self.name, self.root, self.max_model_len = kind, name, folder, max_model_len
        self.load(folder)
        self.owned_by = kind
        self.spoil: Callable[[Any, int], Reply | None] = lambda answer, n: None
        self.texts: Counter[tuple[int, ...]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hold_after: int | None = None
        self.held: Path | None = None
        self.release = threading.Event()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server._post(self)

            def do_GET(self) -> None:
                server.keys.append(self.headers["Authorization"])
                one = {"id": server.name, "object": "model", "owned_by": server.owned_by, "root": server.root}
                found = self.path == "/v1/models"
                listed = {"object": "list", "data": [{**one, "max_model_len": server.max_model_len}]}
                server._send(self, (200 if found else 404, {}, listed if found else {}))

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def load(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def spec(self, tokenizer: str, **keys: Any) -> dict[str, Any]:
        """As a recipe names it."""
        named = {"url": self.url, "model": self.name, "tokenizer": tokenizer, "revision": "first"}
        return {**named, "name": "served", "concurrency": 1, **keys}

    @torch.no_grad()
    def logps(self, ids: list[int]) -> list[float]:
        """Of all tokens but the first."""
        with self._lock:
            logits = self.model(torch.tensor([ids])).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        n = len(self.bodies)
        self.bodies.append(body)
        self.keys.append(handler.headers["Authorization"])
        if self.hold_after is not None and self.texts.total() >= self.hold_after:
            assert self.held is not None
            self.held.touch()
            self.release.wait(60)
            return  # its client is dead
        answer, path = self._vllm(body) if self.kind == "vllm" else self._sglang(body)
        assert handler.path == path
        self._send(handler, self.spoil(answer, n) or (200, {}, answer))

    def _score(self, ids: list[int]) -> list[float]:
        self.texts[tuple(ids)] += 1
        return self.logps(ids)

    def _vllm(self, body: dict[str, Any]) -> tuple[Any, str]:
        assert (body["model"], body["prompt_logprobs"], body["max_tokens"]) == (self.name, 0, 1)
        choices = []
        for i, ids in enumerate(body["prompt"]):
            told = [
                {str(token): {"logprob": logp, "rank": 7, "decoded_token": "x"}}
                for token, logp in zip(ids[1:], self._score(ids), strict=True)
            ]
            choices.append({"index": i, "text": "x", "logprobs": None, "prompt_logprobs": [None, *told]})
        return {"object": "text_completion", "choices": choices[::-1]}, "/v1/completions"

    def _sglang(self, body: dict[str, Any]) -> tuple[Any, str]:
        assert body["return_logprob"] is True and body["sampling_params"]["max_new_tokens"] == 0
        answer = []
        for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            logps = [None, *self._score(ids)[start:]]
            told = [[logp, token, None] for logp, token in zip(logps, ids[start:], strict=True)]
            answer.append({"text": "", "meta_info": {"prompt_tokens": len(ids), "input_token_logprobs": told}})
        return answer, "/generate"

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        status, headers, content = reply
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed, or has waited long enough

    def __enter__(self) -> ScoringServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
