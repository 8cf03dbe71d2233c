"""A reference that is not loaded here: a server of vLLM or SGLang scores the tokens that it is sent.

What a server's weights are cannot be read off files. So four short texts, the canaries, are scored in several ways when a cache is
begun: how far the ways differ is the precision that is measured. Their log-probs are kept beside the scores and compared at every
start, and after every batch before its rows are written: each row in the cache lies between two comparisons that held.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from mrpo_scale.base.atomic_files import atomic_write
from mrpo_scale.base.endpoint import CallRefusedError, Endpoint, StoppedError
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import parse_json, printable, read_json
from mrpo_scale.config.model_spec import server_key
from mrpo_scale.data.model_text import ModelText
from mrpo_scale.data.pairs import SIDES, PairTokens
from mrpo_scale.models.plan import PlannedReference, RunPlan
from mrpo_scale.models.source import Server
from mrpo_scale.references.prompt_logps import FORMATS, ScoredText, WireFormat, WrongAnswerError, response_logp
from mrpo_scale.references.store.cache import ReferenceStore
from mrpo_scale.references.store.part_files import part_names

logger = logging.getLogger(__name__)

KEPT = "served.json"
PAIRS_PER_REQUEST = 2  #: four texts: servers batch what comes together, and a repeated call repeats little
REQUESTS_PER_BATCH = 16  #: of each of the concurrent senders; what a killed job scores again at most
CANARIES = (
    "The river rises in the mountains, crosses three countries and reaches the sea after nine hundred miles of slow water.",
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n    return width * height\n",
    "In 1987, 4 of the 26 members voted against; by 2003 there were 112 of them, and no vote was counted at all.",
    "Q: Which of the two is heavier, and why?\nA: Neither. A kilogram of feathers weighs as much as a kilogram of lead.",
)
#: Between two starts the root mean square per token may be so many times what was measured at the first. The least that is let
#: pass counts for servers whose ways agree to the last bit, which other releases of their kernels do not.
_TIMES, _LEAST = 4.0, 1e-3
_MOST_BYTES = 1 << 28  #: an answer tells about 80 bytes of each token
RETRIES, FIRST_WAIT = 8, 1.0  #: three minutes in all: a server that is started again is waited for
TIMEOUT = 120.0  #: seconds without a byte; all repetitions take less than the half hour that other ranks wait
GLANCE = 5.0  #: the same where nothing is to be scored


@dataclass(frozen=True)
class Kept:
    """What a cache keeps of a server, in ``served.json``."""

    root: str  #: what the server says the model's name stands for
    server: str
    ids: list[list[int]]  #: of the canaries
    logps: list[list[float]]  #: of all their tokens but the first
    precision: float  #: nats per token, root mean square, as measured between ways of asking
    created: str

    @property
    def tolerance(self) -> float:
        """Nats per token, root mean square: what differs more is another model."""
        return max(_LEAST, _TIMES * self.precision)


def read_kept(folder: Path) -> Kept | None:
    """Of a reference's folder in the cache; None where nothing is kept.

    Raises:
        ConfigError: the file cannot be used.
    """
    try:
        kept = Kept(**read_json(folder / KEPT, 1 << 20))
        lengths = [len(ids) - 1 for ids in kept.ids]
        if lengths != [len(logps) for logps in kept.logps] or not np.isfinite(np.concatenate(kept.logps)).all():
            raise ValueError("log-probs do not belong to the tokens")
        return kept if float(kept.precision) >= 0 else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"`ref_cache_dir`: {folder / KEPT} does not tell what a server gave ({error}), so its scores have no witness; move "
            "the folder away, and the reference is scored again."
        ) from None


def compare_served(plan: RunPlan, stores: Sequence[ReferenceStore], missing: Sequence[int], *, is_main: bool) -> None:
    """Look whether the servers of references that have all their scores still serve what gave them. Nothing depends on it, so a
    server that has changed is warned of, and one that does not answer is logged."""
    for planned, store, count in zip(plan.references, stores, missing, strict=True):
        if planned.source.server is None or count or not is_main:
            continue
        try:
            ServedReference(planned, plan.texts[planned.tokenization], store.folder, patient=False).connect()
        except ConfigError as error:
            logger.warning("all scores of %s are in the cache; its server was not needed: %s", planned.name, error)


class ServedReference:
    """Scores pairs over HTTP. One process of a job does so.

    Args:
        text: how the model reads pairs: its tokenizer makes the canaries' tokens.
        folder: of the reference in the score cache.
        patient: False: one attempt, of a few seconds.

    Raises:
        ConfigError: the API key is missing or cannot be sent safely.
    """

    def __init__(self, planned: PlannedReference, text: ModelText, folder: Path, *, patient: bool = True) -> None:
        server = planned.source.server
        assert isinstance(server, Server)
        self.name, self.tokenization, self.model = planned.name, planned.tokenization, planned.source.path
        self.server, self.folder, self._text = server, folder, text
        parts = urlsplit(server.url)
        self.base = urlunsplit((*parts[:2], parts.path.rstrip("/").removesuffix("/v1"), "", ""))
        self._endpoint = Endpoint(
            key="ref_models.url",
            check=f"`model: {self.model}`, `url` and the key in `api_key_env`",
            kept="Scores so far are kept: run the same command again",
            api_key=server_key(server.url, server.api_key_env),
            timeout=TIMEOUT if patient else GLANCE,
            retries=RETRIES if patient else 0,
            first_wait=FIRST_WAIT,
            most_bytes=_MOST_BYTES,
        )
        self._format: WireFormat | None = None
        self._kept: Kept | None = None

    @property
    def rows_per_batch(self) -> int:
        return self.server.concurrency * REQUESTS_PER_BATCH * PAIRS_PER_REQUEST

    def connect(self, longest: int = 0) -> Kept:
        """Ask the server what it is, and compare its canaries with those kept in the cache, or measure and keep them.

        Args:
            longest: tokens of the longest text that will be sent.

        Raises:
            ConfigError: it does not answer, has no such model, is of an unknown kind, takes no text so long, or its weights are
                not those that gave the scores in the cache.
        """
        entry = self._find_model()
        kind = self._kind(entry)
        self._format = FORMATS[kind]
        most = entry.get("max_model_len")
        if isinstance(most, int) and longest + 1 > most:
            raise ConfigError(
                f"{self.name}: {self.base} takes texts of {most} tokens with one to generate, and the data have one of {longest}; "
                "start it with room for them, or lower `max_length`."
            )
        root = printable(str(entry.get("root") or entry["id"]))
        self._kept = read_kept(self.folder)
        if self._kept is None:
            self._kept = self._begin(root, kind)
        elif root != self._kept.root:
            raise ConfigError(
                f"{self.name}: {self.base} says that `{self.model}` stands for {root}; the scores in {self.folder} came from "
                f"{self._kept.root}. Serve that again, or give `revision` another word, and it is scored anew."
            )
        self.check_canaries()
        logger.info(
            "%s: served by %s at %s as %s; precision %.2g nats per token (root mean square)",
            self.name, kind, self.base, root, self._kept.precision,
        )  # fmt: skip
        return self._kept

    def check_canaries(self) -> None:
        """Raises ConfigError where the server's weights are not those of the scores in the cache."""
        assert self._kept is not None
        now = self._ask([ScoredText(ids, 1) for ids in self._kept.ids])
        moved = _rms(now, [np.array(logps) for logps in self._kept.logps])
        if moved > self._kept.tolerance:
            raise ConfigError(
                f"{self.name}: {self.base} has other weights behind `{self.model}` than gave the scores in {self.folder}: its "
                f"canaries moved by {moved:.2g} nats per token, {self._kept.tolerance:.2g} at most are rounding. Rows since the "
                "last comparison are not kept. Serve the old weights again, or give `revision` another word, and it is scored anew."
            )

    def score(self, pairs: Sequence[PairTokens]) -> np.ndarray:
        """Log-probs [n, 2] float32 of n pairs, ``concurrency`` requests at a time; the canaries still held afterwards.

        Raises:
            ConfigError: as :meth:`connect`; a request is refused, or answered with anything but these tokens' log-probs.
        """
        texts = [
            ScoredText([*pair.prompt_ids, *response], len(pair.prompt_ids))
            for pair in pairs
            for response in (pair.chosen_ids, pair.rejected_ids)
        ]
        # What users and tools say between the assistant's turns is read and not scored.
        places = [pair.scored(side) for pair in pairs for side in SIDES]
        logps = [response_logp(one, np.array(at)) for one, at in zip(self._ask(texts), places, strict=True)]
        self.check_canaries()
        return np.array(logps, dtype=np.float32).reshape(-1, 2)

    def _begin(self, root: str, kind: str) -> Kept:
        """Score the canaries in three ways and keep the first."""
        if next(iter(part_names(self.folder)), None) is not None:
            raise ConfigError(
                f"`ref_cache_dir`: {self.folder} holds scores but no {KEPT}, so nothing tells whether {self.base} has the weights "
                "that gave them; move the folder away, and the reference is scored again."
            )
        tokenizer = self._text.tokenizer
        ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in CANARIES]
        texts = [ScoredText(one, 1) for one in ids]
        alone = [self._ask([text])[0] for text in texts]
        together = self._ask(texts)
        crowded = self._ask(texts * 2)[len(texts) :]
        kept = Kept(
            root=root,
            server=kind,
            ids=ids,
            logps=[[float(logp) for logp in logps] for logps in alone],
            precision=max(_rms(alone, together), _rms(alone, crowded)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            atomic_write(self.folder, lambda: KEPT, (json.dumps(asdict(kept), indent=2) + "\n").encode())
        except FileExistsError:
            return read_kept(self.folder) or kept  # another job was first
        return kept

    def _find_model(self) -> dict[str, Any]:
        listed = self._json("/v1/models", None)
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
            raise ConfigError(f"{self.name}: {self.base}/v1/models lists no models; check `url`.")
        found = next((entry for entry in entries if entry["id"] == self.model), None)
        if found is None:
            names = ", ".join(printable(str(entry["id"])) for entry in entries[:5])
            raise ConfigError(f"{self.name}: {self.base} serves no `{self.model}`; it has {names}.")
        return found

    def _kind(self, entry: dict[str, Any]) -> str:
        kind = entry.get("owned_by") if self.server.kind == "auto" else self.server.kind
        if kind not in FORMATS:
            raise ConfigError(
                f"{self.name}: {self.base} does not say whether it is vLLM or SGLang; say it: `server: vllm` or `server: sglang`."
            )
        return str(kind)

    def _ask(self, texts: Sequence[ScoredText]) -> list[np.ndarray]:
        """Of each text the log-probs of its scored tokens, in the order of ``texts``."""
        step, stop = 2 * PAIRS_PER_REQUEST, threading.Event()
        parts = [texts[i : i + step] for i in range(0, len(texts), step)]
        pool = ThreadPoolExecutor(self.server.concurrency)
        futures = [pool.submit(self._ask_once, part, stop) for part in parts]
        try:
            return _results(futures)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask_once(self, texts: Sequence[ScoredText], stop: threading.Event) -> list[np.ndarray]:
        assert self._format is not None
        try:
            answer = self._json(self._format.path, self._format.request(self.model, texts), stop)
            return self._format.read(answer, texts)
        except CallRefusedError as error:
            stop.set()
            raise ConfigError(
                f"{self.name}: {self.base} refuses to score {len(texts)} texts of up to {max(len(t.ids) for t in texts)} tokens: "
                f"{error}; give it room for them, or lower `max_length`."
            ) from None
        except WrongAnswerError as error:
            stop.set()
            raise ConfigError(f"{self.name}: {self.base}{self._format.path} cannot be believed: {error}.") from None
        except BaseException:
            stop.set()  # before the others send again
            raise

    def _json(self, path: str, body: Any, stop: threading.Event | None = None) -> Any:
        try:
            text = self._endpoint.call(self.base + path, body, stop or threading.Event())
        except CallRefusedError as error:
            if body is not None:
                raise
            raise ConfigError(f"{self.name}: {self.base}{path} answers {error}; check `url`.") from None
        try:
            return parse_json(text)
        except ValueError:
            beginning = printable(self._endpoint.without_key(" ".join(text[:200].split())[:80]))
            raise ConfigError(
                f"{self.name}: {urlsplit(self.base).netloc}{path} answers what is not JSON ({beginning!r}); check `url` and what "
                "stands between."
            ) from None


def _results(futures: Sequence[Future[list[np.ndarray]]]) -> list[np.ndarray]:
    """In order; or the first failure, which the others were stopped for."""
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, StoppedError):
            raise error
    return [logps for future in futures for logps in future.result()]


def _rms(logps: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Root mean square of the differences, nats per token."""
    return float(np.sqrt(np.mean((np.concatenate(logps) - np.concatenate(others)) ** 2)))
