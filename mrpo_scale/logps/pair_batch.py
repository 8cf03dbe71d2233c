"""Pairs as tensors: rows of tokens, which of them see each other, and which positions the head scores.

Two ways to lay a pair out. **Shared prompt**: one segment [prompt, chosen, rejected] in which the responses do not see each other
and restart their positions after the prompt, so the prompt is computed once. **Separate**: one segment per response, [prompt,
response]; any causal model takes it.

Two ways to put segments into rows. **Padded**: shared-prompt segments are packed into rows as long as the longest pair, because
the mask that keeps responses apart keeps pairs apart as well; separate ones get a row each and an ordinary padding mask. **End to
end**: one row without any padding, for an attention that is told where each segment lies: flash-attention's varlen calls, or
:mod:`~mrpo_scale.logps.span_attention`.

A response of several turns has context in it (what users and tools say): it is laid out with the rest, and the head never sees it.

P pairs, S = 2P responses ordered (pair 0 chosen, pair 0 rejected, pair 1 chosen, ...), B rows of L positions, T scored tokens of
responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mrpo_scale.data.pairs import SIDES, PairTokens
from mrpo_scale.logps.span_attention import SPAN_ATTENTION, Spans

PROMPT, CHOSEN, REJECTED = 0, 1, 2


@dataclass(frozen=True)
class PairBatch:
    """P pairs ready for one model."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    segment_BL: Tensor  #: which pair (shared prompt) or response (separate) a position belongs to; -1 is padding
    part_BL: Tensor  #: PROMPT, CHOSEN or REJECTED
    logit_index_T: Tensor  #: flat index into [B*L] of the position that predicts each scored token
    labels_T: Tensor
    cu_seqlens: Tensor  #: [2P+1] int32 boundaries of the responses in T
    shared_prompt: bool
    spans: Spans | None  #: where segments lie end to end, B = 1; None: padded rows

    @property
    def num_pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2

    @property
    def response_lengths(self) -> Tensor:
        """[P, 2]: scored tokens of each pair's chosen and rejected."""
        return self.cu_seqlens.diff().view(-1, 2)

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.segment_BL >= 0).sum())

    def to(self, device: torch.device | str) -> PairBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def segment_length(pair: PairTokens, shared_prompt: bool) -> int:
    """Positions that the longest row of this pair needs."""
    chosen, rejected = len(pair.chosen_ids), len(pair.rejected_ids)
    return len(pair.prompt_ids) + (chosen + rejected if shared_prompt else max(chosen, rejected))


def collate_pairs(
    pairs: Sequence[PairTokens], *, shared_prompt: bool, end_to_end: bool = False, pad_token_id: int = 0
) -> PairBatch:
    """Lay P >= 1 pairs out as rows; the order of the responses in the result is the order of ``pairs``."""
    if shared_prompt:
        segments = [[(p.prompt_ids, PROMPT), (p.chosen_ids, CHOSEN), (p.rejected_ids, REJECTED)] for p in pairs]
    else:
        segments = [
            [(p.prompt_ids, PROMPT), (ids, part)]
            for p in pairs
            for ids, part in ((p.chosen_ids, CHOSEN), (p.rejected_ids, REJECTED))
        ]
    lengths = [sum(len(ids) for ids, _ in segment) for segment in segments]
    width = sum(lengths) if end_to_end else max(lengths)
    if end_to_end:
        rows = [list(range(len(segments)))]
    else:
        rows = packed_rows(lengths, width) if shared_prompt else [[s] for s in range(len(segments))]

    shape = (len(rows), width)
    input_ids_BL = torch.full(shape, pad_token_id)
    position_ids_BL = torch.zeros(shape, dtype=torch.long)
    segment_BL = torch.full(shape, -1)
    part_BL = torch.zeros(shape, dtype=torch.long)
    scored = [pair.scored(side) for pair in pairs for side in SIDES]
    responses: list[tuple[list[int], list[int]]] = [([], [])] * (2 * len(pairs))
    for b, row in enumerate(rows):
        start = 0
        for s in row:
            prompt_length = len(segments[s][0][0])
            prompt_end = b * width + start + prompt_length - 1
            for ids, part in segments[s]:
                here = slice(start, start + len(ids))
                first = 0 if part == PROMPT else prompt_length
                input_ids_BL[b, here] = torch.tensor(ids, dtype=torch.long)
                position_ids_BL[b, here] = torch.arange(first, first + len(ids))
                segment_BL[b, here] = s
                part_BL[b, here] = part
                if part != PROMPT:
                    # The last prompt position predicts the first response token, each response token the next one.
                    index = [prompt_end, *range(b * width + start, b * width + start + len(ids) - 1)]
                    response = 2 * s + part - CHOSEN if shared_prompt else s
                    kept = scored[response]
                    responses[response] = ([index[i] for i in kept], [ids[i] for i in kept])
                start += len(ids)
    counts = torch.tensor([0, *(len(ids) for _, ids in responses)])
    return PairBatch(
        input_ids_BL=input_ids_BL,
        position_ids_BL=position_ids_BL,
        segment_BL=segment_BL,
        part_BL=part_BL,
        logit_index_T=torch.tensor([i for index, _ in responses for i in index], dtype=torch.long),
        labels_T=torch.tensor([i for _, ids in responses for i in ids], dtype=torch.long),
        cu_seqlens=counts.cumsum(0).to(torch.int32),
        shared_prompt=shared_prompt,
        spans=_spans(segments, shared_prompt) if end_to_end else None,
    )


def _spans(segments: Sequence[Sequence[tuple[Sequence[int], int]]], shared_prompt: bool) -> Spans:
    lengths = [tuple(len(ids) for ids, _ in segment) for segment in segments]
    return Spans(tuple((n[0], n[1:]) if shared_prompt else (sum(n), ()) for n in lengths))


def packed_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which segments share a row of ``width`` positions: first-fit decreasing."""
    rows: list[list[int]] = []
    room: list[int] = []
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        for row, free in enumerate(room):
            if lengths[s] <= free:
                rows[row].append(s)
                room[row] -= lengths[s]
                break
        else:
            rows.append([s])
            room.append(width - lengths[s])
    return rows


# How a model type takes a mask over pairs. "full": every layer sees everything; "window": every layer has the config's sliding
# window; "layer_types": the model picks a mask per layer from a dict. A model type enters this table only with the test that
# compares it with two plain forwards on texts longer than its window (tests/logps/test_shared_prompt.py): a 4-D mask silently
# switches a model's own window off.
SHARED_PROMPT_MODELS = {
    "cohere": "full",
    "gemma": "full",
    "gemma2": "layer_types",
    "gemma3_text": "layer_types",
    "gpt_neox": "full",
    "granite": "full",
    "llama": "full",
    "mistral": "window",
    "olmo2": "full",
    "qwen2": "layer_types",
    "qwen3": "layer_types",
}


def supports_shared_prompt(config: PretrainedConfig) -> bool:
    """Whether chosen and rejected can share one forward over their prompt: a tested model type under a maskable attention."""
    return config.model_type in SHARED_PROMPT_MODELS and config._attn_implementation in (
        "sdpa",
        "eager",
        SPAN_ATTENTION,
    )


def supports_end_to_end(config: PretrainedConfig) -> bool:
    """Whether segments can lie end to end in one row: nothing but attention mixes positions in these model types, and the
    attention can be told where they lie."""
    told = config._attn_implementation == SPAN_ATTENTION or is_flash(config)
    return config.model_type in SHARED_PROMPT_MODELS and told


def is_flash(config: PretrainedConfig) -> bool:
    return "flash" in str(config._attn_implementation)


def attention_inputs(batch: PairBatch, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments that tell ``config``'s model which positions of ``batch`` see each other."""
    if batch.spans is None:
        return {"attention_mask": attention_mask(batch, config, dtype)}
    if is_flash(config):
        lengths = [trunk for trunk, _ in batch.spans.lengths]
        starts = torch.tensor([0, *lengths], device=batch.input_ids_BL.device).cumsum(0).to(torch.int32)
        varlen = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        return {"attention_mask": None, **varlen, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    unused: Any = batch.segment_BL.new_zeros(1, 1, 1, 1)  # a 4-D mask is passed on as it is: none is made
    if SHARED_PROMPT_MODELS[config.model_type] == "layer_types":
        unused = dict.fromkeys(("full_attention", "sliding_attention"))
    return {"attention_mask": unused, "spans": batch.spans}


def attention_mask(batch: PairBatch, config: PretrainedConfig, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The mask that ``config``'s model takes for ``batch``: [B, L] for separate rows, else [B, 1, L, L] or a dict of them.

    Boolean (True = seen) under ``sdpa``; additive in ``dtype`` under ``eager``, which adds the mask to the scores.
    """
    if not batch.shared_prompt:
        return (batch.segment_BL >= 0).long()
    seen_BLL = _visible(batch)
    kind = SHARED_PROMPT_MODELS[config.model_type]
    window: Any = getattr(config, "sliding_window", None)
    if kind == "layer_types":
        masks = {"full_attention": seen_BLL}
        if "sliding_attention" in (config.layer_types or []):
            masks["sliding_attention"] = _in_window(batch, seen_BLL, window)
        return {name: _as_mask(mask, config, dtype) for name, mask in masks.items()}
    if kind == "window" and window is not None:
        seen_BLL = _in_window(batch, seen_BLL, window)
    return _as_mask(seen_BLL, config, dtype)


def _visible(batch: PairBatch) -> Tensor:
    """[B, L, L]: query sees key if the key is earlier, of the same pair, and of the prompt or of the query's own response."""
    segment, part = batch.segment_BL, batch.part_BL
    same_pair = segment[:, :, None] == segment[:, None, :]
    same_text = (part[:, None, :] == PROMPT) | (part[:, :, None] == part[:, None, :])
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    # Padding forms a segment of its own (-1), so no row of the mask is empty: an empty one is NaN under softmax.
    return same_pair & same_text & causal


def _in_window(batch: PairBatch, seen_BLL: Tensor, window: int) -> Tensor:
    """Restrict to keys fewer than ``window`` *positions* back: the rejected response is far from its prompt in the row only."""
    position = batch.position_ids_BL
    return seen_BLL & ((position[:, :, None] - position[:, None, :]) < window)


def _as_mask(seen_BLL: Tensor, config: PretrainedConfig, dtype: torch.dtype) -> Tensor:
    if config._attn_implementation == "sdpa":
        return seen_BLL[:, None]
    return torch.zeros_like(seen_BLL, dtype=dtype).masked_fill_(~seen_BLL, torch.finfo(dtype).min)[:, None]
