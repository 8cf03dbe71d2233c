"""Where two tokenizations of a sampled response are cut at the same byte, once nothing sampled later can change either side.

A reference's tokens of a text are not those of its beginning: a word that goes on is tokenized anew, so what a reference says up to
a byte that both tokenizations happen to share may depend on what the policy samples after it. A **settled cut** does not: it
stands between a character that is no white space and a space that such a character follows, where a token of the policy begins,
and counts from the first token after which all that has been sampled. References read the pieces between settled cuts one by
one, each as the words that go on a text, so their tokens of a piece are a function of that piece, whatever the tokenizer: not an
observation about it. Tokenizers that keep words apart, as those of language models do, read the whole text in the same tokens;
:func:`read_pieces` says where one does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mrpo_scale.data.model_text import ModelText
from mrpo_scale.data.pairs import PairTokens, PreferencePair

# No byte of a character that is spread over tokens is one of these, so what stands for it meanwhile is none either.
WHITE = " \t\n\v\f\r"


@dataclass(frozen=True)
class SettledPieces:
    """A response of n tokens, cut C times: C + 1 pieces of text, and where they meet."""

    texts: tuple[str, ...]
    before: tuple[int, ...]  #: [C] the policy's tokens before each cut
    known: tuple[int, ...]  #: [C] how many of its tokens must be known, ascending; more than ``before``

    def reached(self, num_tokens: int) -> np.ndarray:
        """[T] int64 how many cuts are settled when the policy draws each of its ``num_tokens`` tokens."""
        return np.searchsorted(np.array(self.known, dtype=np.int64), np.arange(num_tokens), side="right")


def settled_pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> SettledPieces:
    """The settled cuts of a response, each decided by the tokens up to ``known`` alone.

    Args:
        decode: the policy's tokens to text, special ones left out.
        ids: its tokens, without an end of turn.
    """
    texts = [decode(ids[:i]) for i in range(len(ids) + 1)]
    before: list[int] = []
    known: list[int] = []
    for i in range(1, len(ids)):
        text = texts[i]
        if not text.strip(WHITE) or text[-1] in WHITE:
            continue
        enough = next((t for t in range(i + 1, len(texts)) if len(texts[t]) > len(text) + 1), None)
        if enough is None:
            break
        after = texts[enough]
        if not after.startswith(f"{text} ") or after[len(text) + 1] in WHITE:
            continue
        if before and texts[before[-1]] == text:  # tokens without text belong to what stands before them
            before.pop()
            known.pop()
        before.append(i)
        known.append(max([enough, *known[-1:]]))
    bounds = [0, *(len(texts[i]) for i in before)]
    ends = [*before, len(ids)]
    pieces = tuple(texts[end][start:] for start, end in zip(bounds, ends, strict=True))
    return SettledPieces(pieces, tuple(before), tuple(known))


@dataclass(frozen=True)
class ReadPieces:
    """A pair in a reference's tokens, read piece by piece."""

    tokens: PairTokens
    before: tuple[tuple[int, ...], tuple[int, ...]]  #: of each response, the reference's tokens before each cut
    as_whole: bool  #: whether these are also its tokens of the whole text


def read_pieces(
    text: ModelText, pair: PreferencePair, pieces: tuple[SettledPieces, SettledPieces], cut: tuple[bool, bool]
) -> ReadPieces:
    """A sampled pair in the tokens of a model that is not the policy.

    Args:
        pair: with the texts of both samples.
        cut: whether each has no end of turn.

    Raises:
        BadRow: the model's template rejects it.
    """
    reading = text.read(pair)
    whole = text.ids(reading, _ends((str(pair.chosen), str(pair.rejected)), cut))
    firsts = (pieces[0].texts[0], pieces[1].texts[0])
    if not pieces[0].before and not pieces[1].before:
        return ReadPieces(whole, ((), ()), True)
    goes_on = tuple(bool(one.before) or short for one, short in zip(pieces, cut, strict=True))
    begun = text.ids(text.read(replace(pair, chosen=firsts[0], rejected=firsts[1])), _ends(firsts, goes_on))
    responses, before = [], []
    bodies = (reading.chosen.body, reading.rejected.body)
    starts = (begun.chosen_ids, begun.rejected_ids)
    for one, short, body, start in zip(pieces, cut, bodies, starts, strict=True):
        ids, places = list(start), []
        for i, piece in enumerate(one.texts[1:], start=2):
            last = i == len(one.texts)
            # What follows the last cut is not settled, so the template may trim its end as it trims every response's.
            words = piece.rstrip() if last and body == body.rstrip() else piece
            places.append(len(ids))
            ids += text.continuation_ids(words, raw=reading.raw, cut=short or not last)
        responses.append(ids)
        before.append(tuple(places))
    tokens = PairTokens(begun.prompt_ids, *responses)
    return ReadPieces(tokens, (before[0], before[1]), tokens == whole)


def _ends(texts: tuple[str, str], cut: Sequence[bool]) -> tuple[int | None, int | None]:
    """As :meth:`ModelText.ids` takes them: the characters of a response that has no end of turn."""
    first, second = (len(text) if short else None for text, short in zip(texts, cut, strict=True))
    return first, second


@dataclass(frozen=True)
class AlignedResponse:
    """A sample, its settled cuts in every tokenization; of one that counts for nothing there may be none."""

    num_tokens: int  #: of the policy
    pieces: SettledPieces = SettledPieces(("",), (), ())
    before: tuple[tuple[int, ...], ...] = ()  #: of each tokenization but the policy's, the tokens before each cut
    reread: bool = (
        False  #: whether a reference reads the pieces of this one or the other in other tokens than the whole text
    )

    def settled(self, tokenization: int, *, every_token: bool) -> np.ndarray:
        """[T] int64: of a tokenization, the tokens of the response that are settled when the policy draws each of its own.

        Args:
            every_token: of the policy's tokenization, beside another that has it too: each token is a piece.
        """
        if every_token:
            return np.arange(self.num_tokens)
        before = self.pieces.before if tokenization == 0 or not self.before else self.before[tokenization - 1]
        return np.array([0, *before], dtype=np.int64)[self.pieces.reached(self.num_tokens)]
