"""A stand-in for the model hub on 127.0.0.1: models and data sets with revisions, ranges, gates and pushes, every request noted."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_SENTINELofTheHub"


@dataclass
class Hub:
    """``root/models/ORG/NAME/REVISION`` and ``root/datasets/...`` are repositories, ``main`` among the revisions.

    Attributes:
        requests: (method, path, status), in order.
        cut: {file name: after how many bytes each of its next GETs breaks off}.
        gated: repositories that only a request with :data:`TOKEN` sees.
        busy: status of every answer, where it is set.
        ranges: Range headers of GETs that had one.
        tokens: Authorization headers seen.
    """

    root: Path
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    busy: int | None = None
    ranges: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def add(self, folder: str | Path, name: str, kind: str = "models", revision: str = "main") -> str:
        """A copy of a folder becomes a revision of a repository; its name."""
        shutil.copytree(folder, self.root / kind / name / revision)
        return name

    def of(self, name: str) -> list[tuple[str, str, int]]:
        """Requests that were about one repository."""
        return [request for request in self.requests if f"/{name}" in request[1]]

    @contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, self.body = unquote(urlsplit(self.path).path), b""
        if self.command == "POST":
            self.body = self._read()
        self.hub.tokens.add(self.headers["Authorization"])
        if self.hub.busy is not None:
            return self._json({"error": "come back later"}, self.hub.busy)
        for pattern, answer in (
            (r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", self._api),
            (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", self._file),
            (r"/api/repos/create()()()", self._create),
            (r"/api/whoami-v2()()()", lambda *_: self._json({"type": "user", "name": "me", "orgs": []})),
            (r"/api/agent-harnesses()()()", lambda *_: self._json({"standardEnvVars": [], "harnesses": {}})),
            (r"/api/validate-yaml()()()", lambda *_: self._json({"errors": [], "warnings": []})),
        ):
            if match := re.fullmatch(pattern, path):
                return answer(*match.groups())
        return self._json({"error": "no such page"}, 404)

    do_HEAD = do_POST = do_GET

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _repository(self, kind: str, name: str, revision: str) -> tuple[Path, str] | None:
        """(its folder, its commit), or None, and then the answer is sent."""
        everything = self.hub.root / kind / name
        if name in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            message = "Access to this model is restricted; you must be authenticated to access it. Please log in."
            self._json({"error": message}, 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        elif not everything.is_dir():
            gone = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._json({"error": "Repository not found"}, 401, gone)
        else:
            for folder in everything.iterdir():
                if revision in (folder.name, commit(name, folder.name)):
                    return folder, commit(name, folder.name)
            gone = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            self._json({"error": f"Invalid rev id: {revision}"}, 404, gone)
        return None

    def _api(self, kind: str, name: str, rest: str | None) -> None:
        what, _, rest = (rest or "").partition("/")
        if what == "preupload":
            asked = json.loads(self.body)
            lines = (asked.get("gitIgnore") or "").splitlines()
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": _ignored(f["path"], lines)}
                for f in asked["files"]
            ]
            return self._json({"files": files})
        if what == "commit":
            return self._commit(kind, name)
        revision, _, below = rest.partition("/")
        found = self._repository(kind, name, revision or "main")
        if found is None:
            return None
        folder, sha = found
        if what in ("", "revision"):
            siblings = [{"rfilename": path} for path in _files(folder)]
            about = {"id": name, "modelId": name, "sha": sha, "private": False, "gated": False, "disabled": False}
            about |= {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings, "author": "x"}
            return self._json(about | dict.fromkeys(("lastModified", "createdAt"), "2026-01-01T00:00:00.000Z"))
        if what == "tree":
            deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            inside = folder / below
            if not inside.is_dir():
                return self._json({"error": "no such folder"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self._json(
                [_entry(path, folder) for path in sorted(inside.rglob("*") if deep else inside.iterdir())]
            )
        if what == "paths-info":
            paths = (json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode()))["paths"]
            return self._json([_entry(folder / path, folder) for path in paths if (folder / path).exists()])
        return self._json({"error": "no such page"}, 404)

    def _file(self, kind: str | None, name: str, revision: str, path: str) -> None:
        found = self._repository("datasets" if kind else "models", name, revision)
        if found is None:
            return None
        folder, sha = found
        file = folder / path
        if not file.is_file():
            gone = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self._send(404, b"Entry not found", gone)
        data = file.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes", "X-Linked-Size": str(len(data))}
        headers |= {"X-Linked-ETag": etag}
        status, wanted = 200, re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and self.command == "GET":
            start = int(wanted[1])
            self.hub.ranges.append(self.headers["Range"])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        breaks = self.hub.cut.get(file.name) if self.command == "GET" else None
        cut = breaks.pop(0) if breaks else None
        return self._send(status, data, headers, cut)

    def _create(self, *_: str) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        (self.hub.root / "models" / name / "main").mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _commit(self, kind: str, name: str) -> None:
        folder = self.hub.root / kind / name / "main"
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = folder / entry["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(entry["value"]["content"]))
        sha = commit(name, "main")
        self._json({"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), headers or {})

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.hub.requests.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


def commit(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def _ignored(path: str, lines: list[str]) -> bool:
    """What a .gitignore of plain patterns says: of names in any folder, or with a slash in front, in the first."""
    parts = path.split("/")
    return any(
        fnmatch(parts[0], line.strip("/"))
        if line.startswith("/")
        else any(fnmatch(part, line.rstrip("/")) for part in parts)
        for line in lines
        if line.strip() and not line.startswith("#")
    )


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    named = {"path": str(path.relative_to(folder)), "oid": hashlib.sha1(str(path).encode()).hexdigest()}
    if path.is_dir():
        return {"type": "directory", "size": 0, **named}
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    large = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if path.suffix == ".safetensors" else {}
    return {"type": "file", "size": size, **named, **large}


def use(url: str, home: str, offline: bool = False, token: str | None = None) -> None:
    """Point this process's libraries at a hub and at empty caches below ``home``: what HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and
    HF_TOKEN do for a process that has not imported them yet."""
    for target, key, value in _settings(url, home, offline):
        setattr(target, key, value)
    _environment(token)


def _settings(url: str, home: str, offline: bool) -> list[tuple[Any, str, Any]]:
    import datasets
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as transformers_hub

    cache = str(Path(home) / "hub")
    rows = Path(home) / "datasets"
    return [
        (constants, "ENDPOINT", url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HUB_CACHE", cache),
        (constants, "HF_HUB_OFFLINE", offline),
        (constants, "HF_TOKEN_PATH", str(Path(home) / "token")),
        (constants, "HF_HUB_DISABLE_XET", True),
        (constants, "AGENT_HARNESSES_PATH", str(Path(home) / ".agent_harnesses.json")),
        (hf_api.api, "endpoint", url),
        (transformers_hub, "_hf_api", None),  # made once, for the hub of that moment
        (datasets.config, "HF_ENDPOINT", url),
        (datasets.config, "HF_HUB_OFFLINE", offline),
        (datasets.config, "HF_DATASETS_CACHE", rows),
        (datasets.config, "HF_MODULES_CACHE", Path(home) / "modules"),
        (datasets.config, "HUB_DATASETS_URL", url + "/datasets/{repo_id}/resolve/{revision}/{path}"),
    ]


def _environment(token: str | None) -> None:
    import os

    os.environ["NO_PROXY"] = "127.0.0.1"
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token


def patched(
    monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False, token: str | None = None
) -> None:
    """:func:`use`, until the test ends."""
    for target, key, value in _settings(url, str(home), offline):
        monkeypatch.setattr(target, key, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
