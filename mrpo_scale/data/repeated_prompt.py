"""Responses that begin with their own prompt: data sets that keep whole texts in `chosen` and `rejected` beside a `prompt`."""

from __future__ import annotations

from dataclasses import replace

from mrpo_scale.data.pairs import PreferencePair, is_prefilled


def repeats_prompt(pair: PreferencePair) -> bool:
    """Whether both responses begin with the prompt; of a conversation, with its last turn: a user's, or one that they continue. A
    greeting that is answered by the same greeting does too: only the share of such pairs says what a data set is."""
    prompt = _last_text(pair)
    responses = (pair.chosen, pair.rejected)
    return bool(prompt.strip()) and all(
        isinstance(text, str) and text.lstrip().startswith(prompt.strip()) for text in responses
    )


def without_prompt(pair: PreferencePair) -> PreferencePair:
    """A pair for which :func:`repeats_prompt`, with the prompt taken off both responses."""
    goes_on = isinstance(pair.prompt, str) or is_prefilled(pair.prompt)
    prompt = _last_text(pair)
    chosen, rejected = (_rest(text, prompt, goes_on) for text in (str(pair.chosen), str(pair.rejected)))
    return replace(pair, chosen=chosen, rejected=rejected)


def _rest(text: str, prompt: str, goes_on: bool) -> str:
    rest = text[len(prompt) :] if text.startswith(prompt) else text.lstrip()[len(prompt.strip()) :]
    # A raw prompt, or an assistant's turn, goes on in its response: the blank between them is the response's.
    return rest if goes_on else rest.lstrip()


def _last_text(pair: PreferencePair) -> str:
    if isinstance(pair.prompt, str):
        return pair.prompt
    last = pair.prompt[-1]
    return str(last.get("content") or "") if last["role"] in ("user", "assistant") else ""
