"""One text for every model: each model's own tokens of the same prompt and the same two responses.

References differ in tokenizer and template, so only log-probs of whole responses are comparable, and only over the same text.
Prompt and response are therefore tokenized apart (the boundary is exact), and what is too long is decided once, in the policy's
tokens, by cutting the response *text*: every model scores that text, without an end of turn in any of them. Of several turns those
that do not fit go first.

``ModelText`` is how one model reads text, ``tokenize_pair`` one pair for all models; data/pair_dataset.py has whole data sets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mrpo_scale.data.model_text import ModelText, Reading
from mrpo_scale.data.pairs import NO_CUTS, BadRow, Cut, Cuts, PairTokens, PreferencePair
from mrpo_scale.data.remarks import row_remarks

__all__ = ["ModelText", "PairTokens", "TextReader", "TokenizedPair", "row_key", "tokenize_pair"]

# A row with more text, about a million tokens, is bad: it would take minutes and gigabytes to tokenize, and then be cut.
MOST_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class TextReader:
    """A model of a run, the number of the ModelText that it reads, and the rows of its embedding, where they are known."""

    name: str
    tokenization: int
    num_embeddings: int | None


@dataclass(frozen=True)
class TokenizedPair:
    """One pair for all models."""

    pair: PreferencePair  #: the text that is scored, after cuts
    whole: PreferencePair  #: before them
    tokens: tuple[PairTokens, ...]  #: one per ModelText
    cuts: Cuts  #: what is left of chosen, rejected; None: all
    merged: tuple[bool, ...]  #: whether turns were merged, per ModelText
    trimmed: tuple[bool, ...]  #: whether the template trims white space off a response, per ModelText
    changed: tuple[bool, ...]  #: whether it drops or rewrites more of one, per ModelText
    no_tools: tuple[bool, ...]  #: whether it leaves tools, tool calls or tool results out of the prompt, per ModelText
    remarks: tuple[list[str], ...]  #: what else a model does not see, per ModelText; see data/remarks.py

    @property
    def cut(self) -> tuple[bool, bool]:
        """Whether chosen, rejected lost their end."""
        return self.cuts[0] is not None, self.cuts[1] is not None


def tokenize_pair(pair: PreferencePair, texts: Sequence[ModelText], max_length: int | None) -> TokenizedPair:
    """Tokenize one pair for every model; ``texts[0]`` is the policy's, whose tokens ``max_length`` counts.

    Raises:
        BadRow: the pair cannot be scored by every model. Reasons: ``empty_response``, ``identical_responses``, ``empty_prompt``,
            ``prompt_too_long``, ``context_exceeded:<name>``, ``template_rejected:<name>``, ``cut_not_placed:<name>``,
            ``text_too_long``.
        ConfigError: see :meth:`ModelText.render_prompt`.
    """
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if isinstance(response, str) and not response.strip():
            raise BadRow("empty_response", f"{side} has no text")
    if pair.chosen == pair.rejected:
        raise BadRow("identical_responses", "chosen and rejected are the same text")
    characters = sum(map(_characters, (pair.chosen, pair.rejected, pair.prompt, pair.tools)))
    if characters > MOST_CHARACTERS:
        raise BadRow("text_too_long", f"{characters} characters, more than {MOST_CHARACTERS}")
    readings = [text.read(pair) for text in texts]
    cuts = NO_CUTS if max_length is None else texts[0].fit(pair, readings[0], max_length)
    left = cut_pair(pair, cuts)
    if left.chosen == left.rejected:
        raise BadRow("identical_responses", "chosen and rejected are the same text once cut to max_length")
    fewer_turns = _without_last_turns(pair, cuts)
    if fewer_turns != pair:
        readings = [text.read(fewer_turns) for text in texts]
    of_last = (cuts[0].characters if cuts[0] else None, cuts[1].characters if cuts[1] else None)
    tokens = tuple(text.ids(reading, of_last) for text, reading in zip(texts, readings, strict=True))
    for text, reading, ids in zip(texts, readings, tokens, strict=True):
        _check_tokens(text, reading, ids)
    return TokenizedPair(
        pair=left,
        whole=pair,
        tokens=tokens,
        cuts=cuts,
        merged=tuple(reading.merged for reading in readings),
        trimmed=tuple(reading.chosen.trimmed or reading.rejected.trimmed for reading in readings),
        changed=tuple(reading.chosen.changed or reading.rejected.changed for reading in readings),
        no_tools=tuple(reading.no_tools for reading in readings),
        remarks=tuple(row_remarks(pair, text, reading) for text, reading in zip(texts, readings, strict=True)),
    )


def cut_pair(pair: PreferencePair, cuts: Cuts) -> PreferencePair:
    """What ``cuts`` leave of a pair."""
    chosen, rejected = (
        response if cut is None else cut.of(response)
        for response, cut in zip((pair.chosen, pair.rejected), cuts, strict=True)
    )
    return replace(pair, chosen=chosen, rejected=rejected)


def _without_last_turns(pair: PreferencePair, cuts: Cuts) -> PreferencePair:
    """The pair without the turns that ``cuts`` take whole."""
    chosen, rejected = (
        response if cut is None or isinstance(response, str) else Cut(cut.messages, None).of(response)
        for response, cut in zip((pair.chosen, pair.rejected), cuts, strict=True)
    )
    return replace(pair, chosen=chosen, rejected=rejected)


def _check_tokens(text: ModelText, reading: Reading, ids: PairTokens) -> None:
    """Raises BadRow where this model cannot score the pair, or cannot tell its responses apart."""
    if not ids.prompt_ids:
        raise BadRow("empty_prompt", f"no prompt tokens for {text.name}")
    if not (ids.chosen_ids and ids.rejected_ids and reading.chosen.body.strip() and reading.rejected.body.strip()):
        raise BadRow("empty_response", f"a response has no tokens for {text.name}")
    if ids.chosen_ids == ids.rejected_ids:
        raise BadRow("identical_responses", f"{text.name} reads chosen and rejected as the same text")
    length = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
    if text.max_context is not None and length > text.max_context:
        raise BadRow(f"context_exceeded:{text.name}", f"{length} tokens, its context is {text.max_context}")


def _characters(value: Any) -> int:
    """Of all strings in a JSON value."""
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_characters, items))


def prompt_key(pair: PreferencePair) -> int:
    """63 bits that name what the responses answer."""
    parts = [pair.prompt, pair.tools, pair.chat_template_kwargs]
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def row_key(pair: PreferencePair, cuts: Cuts = NO_CUTS, whole: PreferencePair | None = None) -> bytes:
    """16 bytes that name a row in the score cache: a hash of the text that is scored, after cuts, and of which end was cut.

    Without the flags, "A B" whole and "A B C" cut to "A B" would share a key, though only one of them scores an end of turn. What a
    template writes before a response may depend on what was cut off (`</think>`), so a cut row is named by its ``whole`` text too.
    """
    digest = hashlib.blake2b(digest_size=16)
    cut = [c is not None for c in cuts]
    parts: list[Any] = [pair.prompt, pair.tools, pair.chosen, pair.rejected, cut]
    if whole is not None and any(cut):
        parts += [whole.chosen, whole.rejected]
        if not (isinstance(whole.chosen, str) and isinstance(whole.rejected, str)):
            # A turn may be left whole with its end of turn, or without.
            parts.append([c is not None and c.characters is None for c in cuts])
    if pair.chat_template_kwargs:  # rows without have the keys that they had before there were any
        parts.append({"chat_template_kwargs": pair.chat_template_kwargs})
    for i, part in enumerate(parts):
        # In responses the order counts: templates write a call's arguments in it, and what they write is scored.
        text = json.dumps(part, sort_keys=i < 2).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()
