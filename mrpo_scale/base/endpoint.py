"""JSON over HTTP: one call, repeated where that helps, its API key never shown.

The key travels in one header and nowhere else. It is not part of any error or repr; whatever the endpoint says is searched for it
before it is kept; and redirects are not followed, since they would take it to another host.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from mrpo_scale.base.errors import ConfigError

#: Request refused for what it says; asking again as it is cannot help, but other requests may pass.
REFUSED = (400, 413, 422)
RETRIED = (408, 409, 425, 429)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class CallRefusedError(Exception):
    """The endpoint refused this one request."""


class StoppedError(Exception):
    """Another call has failed for good: this one is given up before it is sent."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # urllib then raises the 3xx as an HTTPError


def check_url(url: str, key: str, example: str) -> SplitResult:
    """The parts of an http(s) address without credentials. Raises ConfigError, which names ``key``, on anything else."""
    if "@" in url:
        raise ConfigError(f"`{key}` carries a user or password; take it out and put the key into the environment.")
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"`{key}: {url}` is no http(s) address, such as {example}.")
    return parts


def is_variable(name: str) -> bool:
    """Whether an environment variable can be called so; a key that was typed in its place cannot."""
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None


def read_key(name: str, *, key: str, url_key: str, parts: SplitResult, required: bool) -> str | None:
    """The API key in the environment variable ``name``; None where it is not set and not ``required``.

    Args:
        key, url_key: what a recipe calls the variable's name and the address, whose ``parts`` these are.

    Raises:
        ConfigError: a key that is missing or cannot be sent safely. It shows no value, which may be a key in the wrong place.
    """
    if not is_variable(name):
        raise ConfigError(
            f"`{key}` must be the name of an environment variable; what it got is not shown, as it may be the key."
        )
    value = os.environ.get(name, "").strip()
    if not value:
        if required:
            raise ConfigError(f"`{key}: {name}`: this environment variable is not set; export the key.")
        return None
    if not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(f"the environment variable {name} holds blanks or non-ASCII characters; export the key.")
    if parts.scheme == "http" and parts.hostname not in _LOCAL:
        raise ConfigError(
            f"`{url_key}` at {parts.hostname} is plain http, which would send the key in {name} readable to all; use https, "
            f"or unset {name} if that endpoint needs no key."
        )
    return value


@dataclass(frozen=True)
class Endpoint:
    """Where to call, and what to tell the user when that fails.

    Args:
        key: what a recipe calls the address.
        check: what to look at when a call is refused for good.
        kept: what becomes of the work so far, and how to go on: a whole sentence without its full stop.
        api_key: None sends none.
        retries: repetitions of a call that got 408, 409, 425, 429, 5xx or no answer.
        timeout: seconds without a byte.
        first_wait: seconds before the first repetition; doubled each time, up to ``longest_wait``. A Retry-After goes before it.
        most_bytes: of an answer; what is longer is cut.
    """

    key: str
    check: str
    kept: str
    api_key: str | None = field(default=None, repr=False)
    retries: int = 5
    timeout: float = 120.0
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_retry_after: float = 600.0
    most_bytes: int = 4 << 20

    def call(self, url: str, body: Any, stop: threading.Event) -> str:
        """The text of the answer to a POST of ``body`` as JSON, or to a GET where that is None.

        Raises:
            ConfigError: the endpoint is down, refuses the key or the model, or sends elsewhere.
            CallRefusedError: it refuses this one request.
            StoppedError: ``stop`` was set.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            if stop.is_set():
                raise StoppedError
            try:
                with self._opener().open(self._request(url, body), timeout=self.timeout) as reply:
                    return reply.read(self.most_bytes).decode("utf-8", "replace")
            except urllib.error.HTTPError as error:
                reason = self._reason(url, error)
                wait = self._wait(url, attempt, error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                reason = self.without_key(f"{type(error).__name__}: {getattr(error, 'reason', None) or error}")
                wait = self._wait(url, attempt, None)
            if attempt < self.retries:
                stop.wait(wait)
        raise ConfigError(
            f"`{self.key}`: {without_query(url)} gave no answer in {self.retries + 1} attempts; the last: {reason}. {self.kept} "
            "once it is up."
        )

    def without_key(self, text: str) -> str:
        """``text`` as it may be shown."""
        return text if self.api_key is None else text.replace(self.api_key, "[API key]")

    def _opener(self) -> urllib.request.OpenerDirector:
        return urllib.request.build_opener(_NoRedirect)

    def _request(self, url: str, body: Any) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "User-Agent": "mrpo-scale"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(url, data, headers, method="GET" if body is None else "POST")

    def _reason(self, url: str, error: urllib.error.HTTPError) -> str:
        """What an HTTP error says, if the call is to be repeated.

        Raises:
            ConfigError, CallRefusedError: it is not.
        """
        with error:
            try:
                said = error.read(2000).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                said = ""
        reason = self.without_key(" ".join(f"HTTP {error.code} {error.reason}: {said}".split())[:300])
        if error.code in RETRIED or error.code >= 500:
            return reason
        if error.code in REFUSED:
            raise CallRefusedError(reason)
        remedy = f"check {self.check}"
        if 300 <= error.code < 400:
            host = urlsplit(error.headers.get("Location") or "").hostname
            remedy = f"it redirects to {host or 'another path'}, and a key is not carried there: name the final address"
        raise ConfigError(f"`{self.key}`: {without_query(url)} answers {reason} ({remedy}).")

    def _wait(self, url: str, attempt: int, retry_after: str | None) -> float:
        asked = _seconds(retry_after)
        if asked is not None:
            if asked > self.longest_retry_after:
                raise ConfigError(
                    f"`{self.key}`: {without_query(url)} asks to wait {asked:.0f} s before the next call. {self.kept} then."
                )
            return asked
        # Jitter, so that calls which failed together do not come back together.
        return min(self.longest_wait, self.first_wait * 2**attempt) * random.uniform(0.75, 1.25)


def without_query(url: str) -> str:
    """An address without its query, which some services put keys in."""
    return urlunsplit((*urlsplit(url)[:3], "", ""))


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After as seconds from now; it comes as a number or as a date. None where it is neither."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
