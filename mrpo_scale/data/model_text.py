"""One model's view of text: its tokenizer, its chat template, where a response begins and what ends a turn."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mrpo_scale.data.messages import Message, merge_turns
from mrpo_scale.data.pairs import BadRow, PreferencePair
from mrpo_scale.errors import ConfigError
from mrpo_scale.untrusted import read_text

#: For models without a chat template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ raise_exception('the plain template has no ' + message['role'] + ' turns') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
SENTINEL = "SENTINELRESPONSE"
_MOST_SECONDS = 20.0  #: of computing for one conversation, which takes a millisecond


class ModelText:
    """One model's view of text: tokenizer, chat template, boundary and end of turn.

    Args:
        name: the model in error messages and in the reasons of bad rows: ``policy`` or the reference's name.
        max_context: most positions the model takes; None for no limit.
        chat_template: a Jinja template, or a file with one, to use instead of the model's own.
        plain_template: the same, for a model that has none.
        system: where the template rejects system turns or turns that do not alternate: ``merge`` moves system text into the
            first user turn and joins neighbouring turns of one role; ``native`` and ``error`` stop with a ConfigError. They
            differ where a template drops system text without a word: ``native`` lets it, ``error`` stops, ``merge`` merges.

    Raises:
        ConfigError: a slow tokenizer, a template that cannot be read or rendered, or no way to end a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_context: int | None,
        chat_template: str | None = None,
        plain_template: str = PLAIN_TEMPLATE,
        system: Literal["native", "merge", "error"] | str = "native",
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{name}: {type(tokenizer).__name__} is a slow tokenizer, without the character offsets that cutting responses "
                "needs; use a model folder with a `tokenizer.json`."
            )
        self.tokenizer = tokenizer
        self.name = name
        self.max_context = max_context
        self.system = system
        self.is_plain = not (chat_template or tokenizer.chat_template)
        template = plain_template if self.is_plain else chat_template
        self.template = None if template is None else _read_template(template, name)  # None: the tokenizer's own
        self._bos_ids = self._find_bos()
        self._opening, ending = self._find_turn_ends()
        eos = tokenizer.eos_token_id
        self._end_ids = self._up_to_special(ending) or ([] if eos is None else [eos])
        self._raw_end_ids = self._end_ids if eos is None else [eos]
        if not self._end_ids:
            raise ConfigError(
                f"{name}: its template ends no turn with a special token and its tokenizer has no eos token; set `eos_token` in "
                "tokenizer_config.json or give a `chat_template`."
            )

    def render_prompt(self, pair: PreferencePair) -> str:
        """The prompt as text, up to where the response begins.

        Raises:
            ConfigError: the template rejects the conversation, but would take it under ``system: merge``.
            BadRow: ``template_rejected:<name>``, when it would not take it so either.
        """
        return self._render_prompt(pair)[0]

    def prompt_ids(self, pair: PreferencePair) -> list[int]:
        """Tokens of the prompt; raw strings and the plain template get the BOS that the tokenizer adds, never an EOS."""
        return self._prompt_ids(pair)[0]

    def response_ids(self, text: str, *, raw: bool, cut: bool) -> list[int]:
        """Tokens of a response: its end of turn included unless ``cut``; ``raw`` responses, without a template, end with eos."""
        ids = self._encode(text)
        end = self._raw_end_ids if raw else self._end_ids
        # A text that already spells out its end (`...</s>` in a raw data set) does not end twice.
        return ids if cut or ids[-len(end) :] == end else ids + end

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end, in characters of ``text``, of each of its tokens."""
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]

    def fingerprint(self) -> str:
        """Hex digest of everything here that decides which tokens a text becomes; ``name`` and ``max_context`` do not."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # what the last call left behind; every call sets it anew
        backend.no_padding()
        parts = {
            "backend": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "special": {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()},
            "template": self.template if self.template is not None else self.tokenizer.chat_template,
            # Templates may print today's date; what they print now is part of the text.
            "rendered": self._apply([{"role": "user", "content": "a"}], None, generation_prompt=True),
            "plain": self.is_plain,
            "system": self.system,
            "ids": [self._bos_ids, self._end_ids, self._raw_end_ids, self._opening],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _prompt_ids(self, pair: PreferencePair) -> tuple[list[int], bool]:
        text, merged = self._render_prompt(pair)
        ids = self._encode(text)
        bos = self._bos_ids if isinstance(pair.prompt, str) or self.is_plain else []
        return (ids if ids[: len(bos)] == bos else bos + ids), merged

    def _render_prompt(self, pair: PreferencePair) -> tuple[str, bool]:
        """The text, and whether turns had to be merged for it."""
        if isinstance(pair.prompt, str):
            return pair.prompt, False
        try:
            text = self._apply(pair.prompt, pair.tools, generation_prompt=True)
            problem = self._dropped_system(pair.prompt, text)
            if problem is None:
                return text + self._opening, False
        except TemplateError as error:
            problem = f"rejects a conversation: {error}"
        try:
            text = self._apply(merge_turns(pair.prompt), pair.tools, generation_prompt=True)
        except TemplateError as error:
            raise BadRow(f"template_rejected:{self.name}", str(error)) from error
        if self.system != "merge":
            raise ConfigError(
                f"`system: {self.system}`: {self.name}'s chat template {problem}; set `system: merge` for this model to put "
                "system text into the first user turn and to join neighbouring turns of one role."
            )
        return text + self._opening, True

    def _dropped_system(self, messages: Sequence[Message], rendered: str) -> str | None:
        if self.system == "native":
            return None
        dropped = any(m["role"] == "system" and m["content"].strip() not in rendered for m in messages)
        return "drops system turns" if dropped else None

    def _apply(self, messages: Sequence[Message], tools: list[Any] | None, *, generation_prompt: bool) -> str:
        """Rendered by transformers, in Jinja's immutable sandbox. Raises TemplateError, whatever the template does wrong."""
        try:
            with _limited_time(self.name):
                rendered: Any = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
        except (TemplateError, ConfigError):
            raise
        except Exception as error:
            # A template is a program of its author's: it divides by zero, runs out of memory or calls itself for ever.
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return rendered

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _find_bos(self) -> list[int]:
        """What the tokenizer puts before a text of its own accord."""
        encoding = self.tokenizer("a", return_special_tokens_mask=True)
        ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
        if 0 in special:
            return ids[: special.index(0)]
        return [token for token in ids[:1] if token == self.tokenizer.bos_token_id]  # a vocabulary without an "a"

    def _find_turn_ends(self) -> tuple[str, str]:
        """What the template writes before an assistant's text though its generation prompt lacks it, and what it writes after."""
        user = {"role": "user", "content": "a"}
        try:
            turn = self._apply([user, {"role": "assistant", "content": SENTINEL}], None, generation_prompt=False)
            bare = self._apply([user], None, generation_prompt=False)
            prompt = self._apply([user], None, generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(
                f"{self.name}: its chat template cannot be rendered: {error}; give a `chat_template`."
            ) from error
        before, found, after = turn.partition(SENTINEL)
        if not found:
            raise ConfigError(f"{self.name}: its chat template does not write assistant turns; give a `chat_template`.")
        opening = before.removeprefix(bare) if bare == prompt and before.startswith(bare) else ""
        return (opening if opening.strip() else ""), after

    def _up_to_special(self, ending: str) -> list[int]:
        """The tokens of ``ending`` up to its first special or added token; empty if it has none."""
        ids = self._encode(ending)
        # Some vocabularies (Gemma's) list runs of white space among their added tokens: those end nothing.
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip(" \n\t\r▁")}
        stop = next((i for i, token in enumerate(ids) if token in added), None)
        return [] if stop is None else ids[: stop + 1]


def _read_template(template: str, name: str) -> str:
    """A template given as Jinja text or as the path of a file."""
    if "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(f"{name}: `chat_template: {template}` is neither Jinja text nor a file; correct the path.")
    try:
        return read_text(path)
    except ValueError as error:
        raise ConfigError(f"{name}: `chat_template: {template}` {error}; correct the file.") from error


@contextmanager
def _limited_time(name: str) -> Iterator[None]:
    """End a template that loops without end; nested loops are within the sandbox's rules. It counts the time that this process
    computes, so that a machine that sleeps or is busy does not matter. Only the main thread can be interrupted.

    Raises:
        ConfigError: the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise ConfigError(
            f"{name}: its chat template has computed for {_MOST_SECONDS:g} s on one conversation; give a `chat_template`."
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
