"""Responses that begin with their own prompt: data sets that keep whole texts in `chosen` and `rejected` beside a `prompt`."""

from __future__ import annotations

from dataclasses import replace

from mrpo_scale.data.pairs import PreferencePair


def repeats_prompt(pair: PreferencePair) -> bool:
    """Whether both responses begin with the prompt; of a conversation, with its last user turn. A greeting that is answered by the
    same greeting does too: only the share of such pairs says what a data set is."""
    prompt = _last_text(pair)
    responses = (pair.chosen, pair.rejected)
    return bool(prompt.strip()) and all(
        isinstance(text, str) and text.lstrip().startswith(prompt.strip()) for text in responses
    )


def without_prompt(pair: PreferencePair) -> PreferencePair:
    """A pair for which :func:`repeats_prompt`, with the prompt taken off both responses."""
    prompt, raw = _last_text(pair), isinstance(pair.prompt, str)
    chosen, rejected = (_rest(text, prompt, raw) for text in (str(pair.chosen), str(pair.rejected)))
    return replace(pair, chosen=chosen, rejected=rejected)


def _rest(text: str, prompt: str, raw: bool) -> str:
    rest = text[len(prompt) :] if text.startswith(prompt) else text.lstrip()[len(prompt.strip()) :]
    return (
        rest if raw else rest.lstrip()
    )  # a raw prompt goes on in its response: the blank between them is the response's


def _last_text(pair: PreferencePair) -> str:
    if isinstance(pair.prompt, str):
        return pair.prompt
    last = pair.prompt[-1]
    return str(last.get("content") or "") if last["role"] == "user" else ""
