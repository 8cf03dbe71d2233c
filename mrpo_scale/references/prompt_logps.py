"""How vLLM and SGLang are asked for the log-probs of given tokens, and what they answer.

vLLM: ``POST /v1/completions`` with ``prompt_logprobs``, an extension of OpenAI's API; the log-prob of each prompt token stands
under its id. SGLang: ``POST /generate`` with ``return_logprob``; ``logprob_start_len`` counts from the token before the first one
that is wanted, whose own log-prob is always empty. Both take the log-softmax of the logits, whatever the sampling parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: vLLM writes this for minus infinity, which JSON has no number for.
_VLLM_LOWEST = -9999.0
_ROUNDING = 1e-4  #: a log-prob of 0 may come out a little above


@dataclass(frozen=True)
class ScoredText:
    """Tokens to send, of which those from ``start`` >= 1 on are scored."""

    ids: Sequence[int]
    start: int


class WrongAnswerError(ValueError):
    """An answer that is none to what was asked; says in what."""


@dataclass(frozen=True)
class WireFormat:
    """One kind of server.

    Args:
        path: of its scoring, below the address without ``/v1``.
        request: (model, texts) -> body.
        read: (answer, texts) -> of each text the log-probs of its scored tokens. Raises WrongAnswerError.
    """

    path: str
    request: Callable[[str, Sequence[ScoredText]], dict[str, Any]]
    read: Callable[[Any, Sequence[ScoredText]], list[np.ndarray]]


def _vllm_request(model: str, texts: Sequence[ScoredText]) -> dict[str, Any]:
    prompts = [list(text.ids) for text in texts]
    # One token is generated and thrown away: not all releases take 0.
    return {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}


def _read_vllm(answer: Any, texts: Sequence[ScoredText]) -> list[np.ndarray]:
    choices = _list(_get(answer, "choices"), len(texts), "choices")
    by_index = {_get(choice, "index"): choice for choice in choices}
    if set(by_index) != set(range(len(texts))):
        raise WrongAnswerError("its choices are not numbered as the texts that were sent")
    found = []
    for i, text in enumerate(texts):
        entries = _get(by_index[i], "prompt_logprobs")
        _check_length(entries, len(text.ids), text)
        for at in range(1, len(text.ids)):
            if not isinstance(entries[at], Mapping) or str(text.ids[at]) not in entries[at]:
                raise WrongAnswerError(_other_token(at, text))
        values = [_get(entries[at][str(text.ids[at])], "logprob") for at in range(text.start, len(text.ids))]
        found.append(_numbers(values, text, lowest=_VLLM_LOWEST))
    return found


def _sglang_request(model: str, texts: Sequence[ScoredText]) -> dict[str, Any]:
    return {
        "input_ids": [list(text.ids) for text in texts],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": [text.start - 1 for text in texts],
    }


def _read_sglang(answer: Any, texts: Sequence[ScoredText]) -> list[np.ndarray]:
    found = []
    for one, text in zip(_list(answer, len(texts), "answers"), texts, strict=True):
        meta = _get(one, "meta_info")
        _check_count(_get(meta, "prompt_tokens"), len(text.ids))
        entries = _get(meta, "input_token_logprobs")
        _check_length(entries, len(text.ids) - text.start + 1, text)
        for at, entry in enumerate(entries, text.start - 1):
            if not isinstance(entry, list) or len(entry) < 2 or entry[1] != text.ids[at]:
                raise WrongAnswerError(_other_token(at, text))
        found.append(_numbers([entry[0] for entry in entries[1:]], text, lowest=-math.inf))
    return found


FORMATS = {
    "vllm": WireFormat("/v1/completions", _vllm_request, _read_vllm),
    "sglang": WireFormat("/generate", _sglang_request, _read_sglang),
}


def response_logp(logps: np.ndarray, scored: np.ndarray) -> float:
    """Of a response, from the log-probs of its tokens: the sum of those at the places ``scored``."""
    return float(logps[scored].astype(np.float64).sum())


def _get(value: Any, key: str) -> Any:
    if not isinstance(value, Mapping) or key not in value:
        raise WrongAnswerError(f"it has no `{key}`")
    return value[key]


def _list(value: Any, length: int, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        count = len(value) if isinstance(value, list) else "no list of"
        raise WrongAnswerError(f"{count} {what} to {length} texts")
    return value


def _check_count(count: Any, sent: int) -> None:
    if count != sent:
        raise WrongAnswerError(
            f"it has read {count} of {sent} tokens: it cuts prompts; start it without truncation, with room for them"
        )


def _check_length(entries: Any, wanted: int, text: ScoredText) -> None:
    if not isinstance(entries, list):
        raise WrongAnswerError("it gives no log-probs of the prompt")
    if len(entries) != wanted:
        _check_count(len(text.ids) + len(entries) - wanted, len(text.ids))


def _other_token(at: int, text: ScoredText) -> str:
    return (
        f"at token {at} of {len(text.ids)} it tells of another token than {text.ids[at]}, which was sent: its tokens are not those "
        "of `tokenizer`"
    )


def _numbers(values: Sequence[Any], text: ScoredText, *, lowest: float) -> np.ndarray:
    for at, value in enumerate(values, text.start):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or math.isnan(value) or value > _ROUNDING or value <= lowest:
            shown = "-inf" if number and value <= lowest else value
            raise WrongAnswerError(
                f"the log-prob of token {text.ids[at]} (at {at} of {len(text.ids)}) is {shown}, which no sound model gives"
            )
    return np.minimum(np.array(values, dtype=np.float64), 0.0)
