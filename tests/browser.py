"""Chromium without a window and without a network, over its debugging pipe: no port, no driver, the standard library only."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.tools import find_tool, require_tool


def without_network() -> list[str]:
    """Words that start a command in a network namespace of its own, where not even loopback is up; [] where that is forbidden."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if find_tool("unshare") and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
            return words
    return []


class Browser:
    """One page. ``complaints`` are console errors and warnings, exceptions and violations of the page's security policy;
    ``requests`` every address that it asked for.
    """

    def __init__(self) -> None:
        chromium = require_tool("chromium", "chromium-browser", "google-chrome")
        self._profile = tempfile.TemporaryDirectory(prefix="mrpo-chromium-")
        here, there = os.pipe(), os.pipe()  # we write here[1], it reads here[0]; it writes there[1], we read there[0]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += [f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "about:blank"]
        # The browser expects its pipe at descriptors 3 and 4.
        shell = f'exec "$@" 3<&{here[0]} 4>&{there[1]}'
        self._log = open(Path(self._profile.name) / "log", "wb")  # noqa: SIM115 (closed with the browser)
        self._process = subprocess.Popen(
            [*without_network(), "bash", "-c", shell, "bash", chromium, *flags],
            pass_fds=[here[0], there[1]],
            stdout=self._log,
            stderr=self._log,
        )
        os.close(here[0])
        os.close(there[1])
        self._to, self._from = here[1], there[0]
        self._buffer, self._last, self._events = b"", 0, list[dict[str, Any]]()
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)
        self._log.close()
        shutil.rmtree(self._profile.name, ignore_errors=True)  # its children may still be writing

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result; events that come meanwhile are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._from, 1 << 16)
            assert piece, (Path(self._profile.name) / "log").read_text(errors="replace")[-3000:]
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page and wait until its scripts have run."""
        self._events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self.evaluate("document.readyState") != "complete":
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move_mouse(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        image = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(image["data"]))

    @property
    def complaints(self) -> list[str]:
        self.evaluate("0")  # reads what has come since
        found = []
        for event in self._events:
            kind, params = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(params["args"]))
            elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(json.dumps(params["entry"]))
        return found

    @property
    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self._events if e.get("method") == "Network.requestWillBeSent"]
