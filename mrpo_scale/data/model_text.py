"""How one model reads text: its tokenizer, its chat template, where a response begins and what ends a turn."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SLOW_TO_FAST_CONVERTERS

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.data_keys import PLAIN_TEMPLATE
from mrpo_scale.data.chat_template import ChatTemplate
from mrpo_scale.data.messages import merge_turns
from mrpo_scale.data.pairs import BadRow, Cut, Cuts, Message, PairTokens, PreferencePair, Response, is_prefilled
from mrpo_scale.data.prefill import read_continuation, render_prefilled
from mrpo_scale.data.response_turns import Render, Turns, drops_tools, read_turns
from mrpo_scale.data.turns import SENTINEL, Turn, find_turn, shared_length

#: Raised whenever the same template and tokenizer would give other tokens.
SCHEME = 2
_REMEMBERED = 16  #: texts whose tokens are kept: those of one pair are asked for several times


@dataclass(frozen=True)
class Reading:
    """A pair as one model reads it. ``merged``: whether turns had to be merged; ``no_tools``: whether the template leaves tools,
    calls or results out of the prompt; ``raw``: text without a template."""

    chosen: Turn
    rejected: Turn
    merged: bool
    no_tools: bool
    raw: bool


@dataclass(frozen=True)
class _Sequence:
    """Prompt and response in tokens. ``start``: how many end before the response begins; ``context``: which ones the assistant does
    not write."""

    ids: list[int]
    start: int
    context: list[bool]


def fast_counterpart(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to use instead of a slow tokenizer: the fast class beside it, transformers' conversion, or another model."""
    auto_map = tokenizer.init_kwargs.get("auto_map")
    listed = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else auto_map
    named = listed[1] if isinstance(listed, (list, tuple)) and len(listed) == 2 else None
    kinds = type(tokenizer).__mro__
    beside = (getattr(sys.modules.get(kind.__module__), f"{kind.__name__}Fast", None) for kind in kinds)
    # transformers 5 gives slow classes without a counterpart a second name that ends in Fast.
    real = (kind.__name__ for kind in beside if isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerFast))
    fast = str(named).rpartition(".")[2] if named else next(real, None)
    if fast:
        return f"its fast counterpart is {fast}: save that one into the model's folder, with its `tokenizer.json`"
    if any(kind.__name__ in SLOW_TO_FAST_CONVERTERS for kind in kinds):
        return (
            "its fast counterpart is transformers' "
            "`PreTrainedTokenizerFast(tokenizer_object=convert_slow_tokenizer(tokenizer))`: save that into the model's folder"
        )
    return "it has no fast counterpart in its folder or in transformers; use a model folder with a `tokenizer.json`"


class ModelText:
    """How one model reads text: tokenizer, chat template, boundary and end of turn.

    Args:
        name: the model in error messages and in the reasons of bad rows: ``policy`` or the reference's name.
        max_context: most positions the model takes; None for no limit.
        chat_template: a Jinja template, or a file with one, to use instead of the model's own.
        plain_template: the same, for a model that has none.
        system: where the template rejects system turns or turns that do not alternate: ``merge`` moves system text into the
            first user turn and joins neighbouring turns of one role; ``native`` and ``error`` stop with a ConfigError. They
            differ where a template drops system text without a word: ``native`` lets it, ``error`` stops, ``merge`` merges.
        date: what a template that asks for today's date gets; None: today.

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
        date: datetime.date | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{name}: {type(tokenizer).__name__} is a slow tokenizer, without the character offsets that cutting responses "
                f"needs; {fast_counterpart(tokenizer)}."
            )
        self.tokenizer = tokenizer
        self.name = name
        self.max_context = max_context
        self.system = system
        self.is_plain = not (chat_template or tokenizer.chat_template)
        self._template = ChatTemplate(
            tokenizer, plain_template if self.is_plain else chat_template, name=name, date=date
        )
        self._encoded: dict[str, list[int]] = {}
        self._bos_ids = self._find_bos()
        self._added_prompt, self._opening, self._ending = self._find_turn_ends()
        eos = tokenizer.eos_token_id
        self._end_text = self._up_to_special(self._ending)
        self._end_ids = self._encode(self._end_text) or ([] if eos is None else [eos])
        self._raw_end_ids = self._end_ids if eos is None else [eos]
        if not self._end_ids:
            raise ConfigError(
                f"{name}: its template ends no turn with a special token and its tokenizer has no eos token; set `eos_token` in "
                "tokenizer_config.json or give a `chat_template`."
            )

    @property
    def template(self) -> str | None:
        """The Jinja text in use; None: the tokenizer's own."""
        return self._template.text

    @property
    def prints_date(self) -> bool:
        """Whether the template asks for the date, so that tokens depend on it."""
        return self._template.prints_date

    def takes_argument(self, name: str) -> bool:
        """Whether the template uses an argument of that name."""
        return name in self._template.arguments

    def names_field(self, name: str) -> bool:
        """Whether the template can show a field of messages."""
        return self._template.names_field(name)

    def control_tokens(self, value: Any) -> list[str]:
        """The special tokens that are spelled out in a text, or in the texts of messages: they become the tokens."""
        if isinstance(value, str):
            return self._control.findall(value) if self._control is not None else []
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        return [token for item in items for token in self.control_tokens(item)]

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        # Texts have marks of reasoning on purpose.
        meant = [token for token in special if token.strip() and token not in ("<think>", "</think>")]
        longest_first = sorted(meant, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def render_prompt(self, pair: PreferencePair) -> str:
        """The prompt as text, as a model gets it that shall answer, or continue its last turn.

        Raises:
            ConfigError: the template rejects the conversation, but would take it under ``system: merge``.
            BadRow: ``template_rejected:<name>``, when it would not take it so either; ``malformed``: see data/prefill.py.
        """
        return pair.prompt if isinstance(pair.prompt, str) else self._render_prompt(pair)[1]

    def prompt_ids(self, pair: PreferencePair) -> list[int]:
        """Tokens of :meth:`render_prompt`; raw strings and the plain template get the BOS that the tokenizer adds, never an EOS."""
        return list(self._with_bos(self._encode(self.render_prompt(pair)), isinstance(pair.prompt, str)))

    def response_ids(self, text: str, *, raw: bool, cut: bool) -> list[int]:
        """Tokens of a response: its end of turn included unless ``cut``; ``raw`` responses, without a template, end with eos."""
        return list(self._ended(text, raw=raw, cut=cut))

    def continuation_ids(self, text: str, *, raw: bool, cut: bool) -> list[int]:
        """The same of a text that goes on after a letter: a function of ``text``, whatever stood before."""
        letter, ids = self._encode("a"), self._ended("a" + text, raw=raw, cut=cut)
        joined = ids[: len(letter)] == letter
        return list(ids[len(letter) :] if joined else self._ended(text, raw=raw, cut=cut))

    def read(self, pair: PreferencePair) -> Reading:
        """Both responses after the prompt, as the template renders the two whole conversations.

        Raises:
            BadRow, ConfigError: see :meth:`render_prompt`.
        """
        if isinstance(pair.prompt, str):
            chosen, rejected = (_raw(pair.prompt, response) for response in (pair.chosen, pair.rejected))
            return Reading(chosen, rejected, merged=False, no_tools=False, raw=True)
        messages, prompt, merged = self._render_prompt(pair)
        try:
            chosen, rejected = (
                self._read_response(messages, pair, prompt, response) for response in (pair.chosen, pair.rejected)
            )
            without_tools = self._renderer(replace(pair, tools=None)) if pair.tools else None
            no_tools = drops_tools(self._renderer(pair), messages, without_tools)
        except TemplateError as error:
            raise BadRow(f"template_rejected:{self.name}", str(error)) from error
        return Reading(chosen, rejected, merged, no_tools, raw=False)

    def ids(self, reading: Reading, cuts: tuple[int | None, int | None]) -> PairTokens:
        """Tokens of the prompt, the chosen and the rejected response: prompt and response together are the tokens of the
        template's rendering up to the end of turn.

        The prompt ends where the first response begins in its tokens, or where the two conversations part, if that is earlier:
        what the template writes before both responses is prompt, what it writes before one of them is part of that response.
        Of a response of several turns a token is scored if any of its characters is the assistant's; the rest is context.

        Args:
            cuts: how many characters of each response's last turn are scored, without an end of turn; None: all.

        Raises:
            BadRow: ``cut_not_placed:<name>``, when the template rewrites a response that is cut.
        """
        both = []
        for (turn, head), cut in zip(self._with_heads(reading), cuts, strict=True):
            body = turn.body if cut is None else turn.upto(cut)
            if body is None:
                raise BadRow(f"cut_not_placed:{self.name}", "its template rewrites a response that max_length cuts")
            both.append(self._sequence(turn, head, body, raw=reading.raw, cut=cut is not None))
        chosen, rejected = both
        shared = min(chosen.start, rejected.start, shared_length(chosen.ids, rejected.ids))
        # Of two texts all that is not prompt is scored: what a template writes before one of them belongs to it.
        several = isinstance(reading.chosen, Turns) or isinstance(reading.rejected, Turns)
        return PairTokens(
            prompt_ids=chosen.ids[:shared],
            chosen_ids=chosen.ids[shared:],
            rejected_ids=rejected.ids[shared:],
            chosen_context=_runs(chosen.context[shared:]) if several else [],
            rejected_context=_runs(rejected.context[shared:]) if several else [],
        )

    def fit(self, pair: PreferencePair, reading: Reading, max_length: int) -> Cuts:
        """What of each response fits ``max_length`` tokens with what stands before; None where all of it fits.

        Of several turns the last ones go, each with what users and tools said before it, until the rest fits; of the first that
        goes so much of its text stays as fits, if it is nothing but text. What is left is a conversation of its own: templates may
        write its last turn as they write last turns.

        Raises:
            BadRow: ``prompt_too_long``, when nothing of a response's first turn fits; ``cut_not_placed:<name>``.
        """
        cuts: list[Cut | None] = []
        for (turn, head), response in zip(self._with_heads(reading), (pair.chosen, pair.rejected), strict=True):
            if isinstance(turn, Turns) and not isinstance(response, str):
                cuts.append(self._fit_turns(pair, turn, head, response, max_length))
                continue
            characters = self._fit(turn, head, max_length, reading.raw)
            if characters == 0:
                room = max(0, max_length - len(self._with_bos(head, reading.raw)))
                raise BadRow(
                    "prompt_too_long",
                    f"max_length {max_length} leaves {room} tokens after the prompt, and they hold no text of a response",
                )
            cuts.append(None if characters is None else Cut(1, characters))
        return cuts[0], cuts[1]

    def fingerprint(self) -> str:
        """Hex digest of everything here that decides which tokens a text becomes; ``name`` and ``max_context`` do not."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # what the last call left behind; every call sets it anew
        backend.no_padding()
        parts = {
            "scheme": SCHEME,
            "backend": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "special": {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()},
            "template": self.template if self.template is not None else self.tokenizer.chat_template,
            "date": self._template.date.isoformat() if self.prints_date else None,
            "plain": self.is_plain,
            "system": self.system,
            "ids": [self._bos_ids, self._end_ids, self._raw_end_ids],
            "around": [self._added_prompt, self._opening, self._end_text],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _render_prompt(self, pair: PreferencePair) -> tuple[Sequence[Message], str, bool]:
        """The messages that the template takes, :meth:`render_prompt`, and whether turns were merged for it."""
        assert not isinstance(pair.prompt, str)
        try:
            text = self._prompt_text(pair.prompt, pair)
            problem = self._dropped_system(pair.prompt, text)
            if problem is None:
                return pair.prompt, text, False
        except TemplateError as error:
            problem = f"rejects a conversation: {error}"
        merged = merge_turns(pair.prompt)
        try:
            text = self._prompt_text(merged, pair)
        except TemplateError as error:
            raise BadRow(f"template_rejected:{self.name}", str(error)) from error
        if self.system != "merge":
            raise ConfigError(
                f"`system: {self.system}`: {self.name}'s chat template {problem}; set `system: merge` for this model to put "
                "system text into the first user turn and to join neighbouring turns of one role."
            )
        return merged, text, True

    def _prompt_text(self, messages: Sequence[Message], pair: PreferencePair) -> str:
        if is_prefilled(messages):
            return render_prefilled(self._renderer(pair), messages)
        return self._apply(messages, pair, generation_prompt=True) + self._added_prompt

    def _read_response(
        self, messages: Sequence[Message], pair: PreferencePair, prompt: str, response: Response
    ) -> Turn:
        """Raises TemplateError."""
        if is_prefilled(messages):
            return read_continuation(self._renderer(pair), messages, response)
        if not isinstance(response, str):
            return read_turns(self._renderer(pair), messages, response, self._turn_end, self._added_prompt)

        def answered(text: str) -> str:
            answer = {"role": "assistant", "content": text}
            return self._apply([*messages, answer], pair, generation_prompt=False)

        whole = answered(response)
        if whole == prompt + self._opening + response + self._ending:  # as the template did for the first conversation
            return Turn(prompt, self._opening, response, response)
        bare = self._apply(messages, pair, generation_prompt=False)
        turn = find_turn(whole, answered(SENTINEL), prompt=prompt, bare=bare, opening=self._opening, response=response)
        if turn is None:
            raise TemplateError("it does not write an answer to this conversation")
        return turn

    def _fit(self, turn: Turn, head: list[int], max_length: int, raw: bool) -> int | None:
        """Characters of the (last) turn's text that fit: none of one that calls tools; None where all of it fits, with its end."""
        if len(self._sequence(turn, head, turn.body, raw=raw, cut=False).ids) <= max_length:
            return None
        if isinstance(turn, Turns) and not turn.response:
            return 0
        room = max(0, max_length - len(self._with_bos(head, raw)))
        ends = [end - len(turn.lead) for _, end in self._offsets(turn.lead + turn.body)[:room]]
        # Reasoning may stand before the text of a last turn.
        before = max(0, -(turn.skipped or 0))
        for end in reversed(ends):
            text = turn.body[: max(0, end)]
            if not text[before:].strip():
                break
            # The cut text alone may have more tokens than it had within the whole: a character is often spread over several.
            if len(self._sequence(turn, head, text, raw=raw, cut=True).ids) <= max_length:
                if turn.skipped is None:
                    raise BadRow(f"cut_not_placed:{self.name}", "its template rewrites a response that max_length cuts")
                return turn.skipped + len(text)
        return 0

    def _fit_turns(
        self, pair: PreferencePair, turns: Turns, head: list[int], response: list[Message], max_length: int
    ) -> Cut | None:
        sequence = self._sequence(turns, head, turns.body, raw=False, cut=False)
        if len(sequence.ids) <= max_length:
            return None
        ends = [i + 1 for i, message in enumerate(response) if message["role"] == "assistant"]
        offsets = self._offsets(turns.lead)
        fitting = sum(sum(start < end for start, _ in offsets) <= max_length for _, end in turns.spans[:-1])
        for kept in reversed(ends[: fitting + 1]):
            left = Cut(kept, None).of(response)
            last, last_head = self._with_heads(self.read(replace(pair, chosen=left, rejected=left)))[0]
            characters = self._fit(last, last_head, max_length, False)
            if characters != 0:
                return Cut(kept, characters)
        raise BadRow("prompt_too_long", f"max_length {max_length} holds no text of a response's first turn")

    def _with_heads(self, reading: Reading) -> list[tuple[Turn, list[int]]]:
        """Both responses, each with the tokens of its head."""
        chosen = self._encode(reading.chosen.head)
        same = reading.rejected.head == reading.chosen.head
        return [(reading.chosen, chosen), (reading.rejected, chosen if same else self._encode(reading.rejected.head))]

    def _sequence(self, turn: Turn, head: list[int], body: str, *, raw: bool, cut: bool) -> _Sequence:
        """Tokens of prompt and response. Those that end before ``body`` begins are not the response's: one that reaches into it is.

        They are those of the text as one where that has a token boundary at the end of the generation prompt, else of the two
        texts: when a model generates, no token spans that place.
        """
        if isinstance(turn, Turns):
            return self._sequence_of_turns(turn, body, cut)
        text = turn.lead + body
        ids = [] if raw else self._ended(turn.head + text, raw=raw, cut=cut)
        apart = raw or ids[: len(head)] != head
        if apart:
            ids = head + self._ended(text, raw=raw, cut=cut)
        start = len(head)
        if turn.lead:
            before = turn.lead if apart else turn.head + turn.lead
            within = sum(end <= len(before) for _, end in self._offsets(before + body))
            start = start + within if apart else within
        complete = self._with_bos(ids, raw)
        added = len(complete) - len(ids)
        of_prompt = added + (len(head) or start)
        context = [True] * of_prompt + [False] * (len(complete) - of_prompt)
        return _Sequence(complete, start + added, context)

    def _sequence_of_turns(self, turns: Turns, body: str, cut: bool) -> _Sequence:
        """The same, with the same rule at the end of every generation prompt."""
        text = turns.lead + body + ("" if cut else turns.ending)
        offsets = self._offsets(text)
        apart = [start for start, _ in turns.spans if any(a < start < b for a, b in offsets)]
        pieces = [(start, text[start:end]) for start, end in pairwise([0, *apart, len(text)])]
        ids = [token for _, piece in pieces for token in self._encode(piece)]
        if apart:
            offsets = [(start + a, start + b) for start, piece in pieces for a, b in self._offsets(piece)]
        context = [not turns.scores(*offset) for offset in offsets]
        if not cut and not turns.ending and ids[-len(self._end_ids) :] != self._end_ids:
            ids += self._end_ids
            context += [False] * len(self._end_ids)
        complete = self._with_bos(ids, False)
        added = len(complete) - len(ids)
        start = added + sum(end <= turns.begin for _, end in offsets)
        return _Sequence(complete, start, [True] * added + context)

    def _ended(self, text: str, *, raw: bool, cut: bool) -> list[int]:
        """Tokens of a text and its end of turn. One that already spells out its end (`...</s>`) does not end twice."""
        end_text = self._end_text
        if end_text and not raw and not cut and not text.endswith(end_text):
            return self._encode(text + end_text)
        ids = self._encode(text)
        end = self._raw_end_ids if raw else self._end_ids
        return ids if cut or ids[-len(end) :] == end else ids + end

    def _with_bos(self, ids: list[int], raw: bool) -> list[int]:
        bos = self._bos_ids if raw or self.is_plain else []
        return ids if ids[: len(bos)] == bos else bos + ids

    def _dropped_system(self, messages: Sequence[Message], rendered: str) -> str | None:
        if self.system == "native":
            return None
        dropped = any(m["role"] == "system" and m["content"].strip() not in rendered for m in messages)
        return "drops system turns" if dropped else None

    def _renderer(self, pair: PreferencePair) -> Render:
        return lambda messages, generation_prompt: self._apply(messages, pair, generation_prompt=generation_prompt)

    def _apply(self, messages: Sequence[Message], pair: PreferencePair | None, *, generation_prompt: bool) -> str:
        """``pair``: whose tools and arguments the template gets."""
        tools, arguments = (pair.tools, pair.chat_template_kwargs) if pair is not None else (None, None)
        return self._template.render(messages, tools, arguments, generation_prompt=generation_prompt)

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            if len(self._encoded) >= _REMEMBERED:
                self._encoded.clear()
            self._encoded[text] = (
                self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            )
        return self._encoded[text]

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end, in characters of ``text``, of each of its tokens."""
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]

    def _find_bos(self) -> list[int]:
        """What the tokenizer puts before a text of its own accord."""
        encoding = self.tokenizer("a", return_special_tokens_mask=True)
        ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
        if 0 in special:
            return ids[: special.index(0)]
        return [token for token in ids[:1] if token == self.tokenizer.bos_token_id]  # a vocabulary without an "a"

    def _find_turn_ends(self) -> tuple[str, str, str]:
        """Of a short conversation: the assistant's header where the template has no generation prompt, what it writes between
        generation prompt and answer, and what after the answer."""
        user = {"role": "user", "content": "a"}
        try:
            turn = self._apply([user, {"role": "assistant", "content": SENTINEL}], None, generation_prompt=False)
            bare = self._apply([user], None, generation_prompt=False)
            prompt = self._apply([user], None, generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(
                f"{self.name}: its chat template cannot be rendered: {error}; give a `chat_template`."
            ) from error
        before, found, after = turn.rpartition(SENTINEL)
        if not found:
            raise ConfigError(f"{self.name}: its chat template does not write assistant turns; give a `chat_template`.")
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        # White space alone is no header: a token that it makes with the answer is the answer's.
        return (opening, "", after) if bare == prompt and opening.strip() else ("", opening, after)

    def _turn_end(self, text: str, end: int) -> tuple[int, int]:
        """See :data:`~mrpo_scale.data.response_turns.Ending`: the first special or added token that ends after ``end`` ends the
        turn. Templates that end no turn with such a token end none of several turns with one."""
        ends = zip(self._encode(text), self._offsets(text), strict=True) if self._end_text else ()
        ending = next(((a, b) for token, (a, b) in ends if token in self._added and b > end), None)
        return (end, end) if ending is None else (min(end, ending[0]), ending[1])

    @cached_property
    def _added(self) -> set[int]:
        # Some vocabularies (Gemma's) list runs of white space among their added tokens: those end nothing.
        return {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip(" \n\t\r▁")}

    def _up_to_special(self, ending: str) -> str:
        """``ending`` up to its first special or added token; empty if it has none."""
        ends = zip(self._encode(ending), self._offsets(ending), strict=True) if ending else ()
        return next((ending[:end] for token, (_, end) in ends if token in self._added), "")


def _raw(prompt: str, response: Response) -> Turn:
    if not isinstance(response, str):
        raise BadRow("malformed", "a response of messages follows a prompt that is a string, so no template writes it")
    return Turn(prompt, "", response, response)


def _runs(context: list[bool]) -> list[int]:
    """Bounds of the runs of True."""
    marks = [False, *context, False]
    return [i for i, (before, after) in enumerate(pairwise(marks)) if before != after]
