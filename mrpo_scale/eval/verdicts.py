"""Ask the judge about every pair of answers in both orders, and keep each answer the moment it comes: nothing is paid for twice."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tqdm.auto import tqdm

from mrpo_scale.base.endpoint import CallRefusedError, StoppedError
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.eval.judge import INSTRUCTIONS, Judge, Verdict, parse_verdict, question
from mrpo_scale.eval.records import RecordFile

ASK_AT_MOST = 2  #: a judge that answers nonsense is asked once more
MOST_INVALID = 0.1
CHARACTERS_PER_TOKEN = 4  #: a rule of thumb for English: the judge's tokenizer is not known


@dataclass(frozen=True)
class Call:
    """One question to the judge: ``a`` is shown first."""

    prompt: str
    a: str
    b: str

    def key(self, judge: Judge) -> str:
        """Of everything that the verdict depends on. The address is left out: the same model behind another one is no news."""
        parts = [INSTRUCTIONS, judge.model, judge.options, self.prompt, self.a, self.b]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Verdicts:
    """The verdicts of one judge, read from and written to ``file``."""

    def __init__(self, judge: Judge, file: RecordFile) -> None:
        self.judge, self._file = judge, file
        self._answers: dict[str, list[Verdict | None]] = {}
        for record in file.records:
            self._answers.setdefault(record["key"], []).append(record["verdict"])

    def of(self, call: Call) -> Verdict | None:
        """The last answer's verdict: None is an invalid one. Raises KeyError where the call was never answered."""
        return self._answers[call.key(self.judge)][-1]

    def is_settled(self, call: Call) -> bool:
        """Whether no call is left to make: a verdict, or as much nonsense as is asked for."""
        answers = self._answers.get(call.key(self.judge), [])
        return bool(answers) and (answers[-1] is not None or len(answers) >= ASK_AT_MOST)

    def open(self, calls: Sequence[Call]) -> list[Call]:
        """Those that are not settled, each once."""
        return list({call.key(self.judge): call for call in calls if not self.is_settled(call)}.values())

    def collect(self, calls: Sequence[Call], concurrency: int) -> None:
        """Settle every call, ``concurrency`` at a time.

        Raises:
            ConfigError: the endpoint is down or refuses everything; or more than a tenth of the calls stay invalid.
        """
        todo, stop = self.open(calls), threading.Event()
        self._check_invalid(calls, "")
        progress = tqdm(total=len(todo), desc=f"Judging with {self.judge.model}", disable=not todo)
        pool = ThreadPoolExecutor(concurrency)
        try:
            for future in as_completed([pool.submit(self._settle, call, calls, stop) for call in todo]):
                if not isinstance(future.exception(), StoppedError):  # the call that stopped it is among the futures
                    future.result()
                progress.update()
        finally:
            # Calls under way are answered, and kept; the others are never sent.
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            progress.close()

    def _settle(self, call: Call, calls: Sequence[Call], stop: threading.Event) -> None:
        """Ask until settled, recording each answer. In the worker, so that an error stops the others before they send again."""
        try:
            while not self.is_settled(call):
                words = self._ask(call, stop)
            if self.of(call) is None:
                self._check_invalid(calls, words)
        except BaseException:
            stop.set()
            raise

    def _ask(self, call: Call, stop: threading.Event) -> str:
        try:
            words = self.judge.ask(question(call.prompt, call.a, call.b), stop)
            verdict = parse_verdict(words)
        except CallRefusedError as refused:
            words, verdict = f"(refused) {refused}", None
        key = call.key(self.judge)
        self._file.append({"key": key, "judge": self.judge.model, "verdict": verdict, "answer": words[:2000]})
        self._answers.setdefault(key, []).append(verdict)
        return words

    def _check_invalid(self, calls: Sequence[Call], words: str) -> None:
        """Stop as soon as too many are invalid, whatever the others will say."""
        keys = {call.key(self.judge) for call in calls if self.is_settled(call)}
        invalid = sum(self._answers[key][-1] is None for key in keys)
        total = len({call.key(self.judge) for call in calls})
        if invalid > MOST_INVALID * total:
            said = f"; one of them: {' '.join(words.split())[:200]!r}" if words else ""
            raise ConfigError(
                f"`judge_model: {self.judge.model}` gave no verdict in {invalid} of {total} calls, each asked {ASK_AT_MOST} times"
                f"{said}. More than {MOST_INVALID:.0%} is too much to trust the others: take another judge, or give it room in "
                f"`judge_options` (now {json.dumps(self.judge.options)}). All answers are in {self._file.path}."
            )


@dataclass(frozen=True)
class Cost:
    """What a set of calls will take. Tokens are estimates: the judge's tokenizer is not known."""

    calls: int
    answered: int  #: settled in an earlier run
    prompt_tokens: int
    completion_tokens: int  #: at most, where the options bound them
    bounded: bool
    price: float | None

    def __str__(self) -> str:
        known = f" ({self.answered} more are answered already)" if self.answered else ""
        most = "at most" if self.bounded else "about"
        price = "" if self.price is None else f", about {self.price:.2f} by --judge_price"
        return (
            f"{self.calls} calls{known}, about {self.prompt_tokens:,} prompt tokens and {most} {self.completion_tokens:,} "
            f"completion tokens{price}; estimated at {CHARACTERS_PER_TOKEN} characters per token, nonsense asked again not counted"
        )


def estimate(verdicts: Verdicts, calls: Sequence[Call], price: Sequence[float]) -> Cost:
    """Of the calls that are not settled. ``price``: of a million prompt and a million completion tokens, or empty."""
    todo, options = verdicts.open(calls), verdicts.judge.options
    characters = sum(len(INSTRUCTIONS) + len(question(call.prompt, call.a, call.b)) for call in todo)
    bound = options.get("max_completion_tokens", options.get("max_tokens"))
    prompt_tokens = characters // CHARACTERS_PER_TOKEN
    completion_tokens = len(todo) * (bound or 8)
    cost = None
    if price:
        cost = (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6
    distinct = len({call.key(verdicts.judge) for call in calls})
    return Cost(len(todo), distinct - len(todo), prompt_tokens, completion_tokens, bound is not None, cost)


def confirm(cost: Cost, judge: Judge, yes: bool) -> None:
    """Show what will be paid and ask, unless ``yes`` or nothing is to be paid.

    Raises:
        ConfigError: nobody is there to ask, or the answer is no.
    """
    print(f"judge {judge.model} at {judge.shown_url}: {cost}", flush=True)
    if yes or not cost.calls:
        return
    if not sys.stdin.isatty():
        raise ConfigError("the judge costs what is shown above and nobody is there to ask: add --yes to go on.")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("stopped before any call to the judge; responses are kept for the next run.")
