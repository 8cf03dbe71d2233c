"""Pairs as tensors: rows of tokens, which of them see each other, and which positions the head scores.

Two ways to lay a pair out. **Shared prompt**: one segment [prompt, chosen, rejected] in which the responses do not see each other
and restart their positions after the prompt, so the prompt is computed once. **Separate**: one segment per response, [prompt,
response]; any causal model takes it.

Two ways to put segments into rows. **Padded**: shared-prompt segments are packed into rows as long as the longest pair, because
the mask that keeps responses apart keeps pairs apart as well; separate ones get a row each and an ordinary padding mask. **End to
end**: one row without any padding, for an attention that is told where each segment lies:
:mod:`~mrpo_scale.logps.attention_ways` on a GPU, :mod:`~mrpo_scale.logps.span_attention` on a CPU.

**Over a sequence group**: a row end to end whose tokens lie on several ranks (:mod:`~mrpo_scale.logps.sequence_parallel`). Rows,
spans and lengths are those of the whole row; what reaches the head is this rank's.

A response of several turns has context in it (what users and tools say): it is laid out with the rest, and the head never sees it.

P pairs, S = 2P responses ordered (pair 0 chosen, pair 0 rejected, pair 1 chosen, ...), B rows of L positions, T scored tokens of
responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mrpo_scale.base.device import send_together
from mrpo_scale.data.pairs import SIDES, PairTokens
from mrpo_scale.logps.attention_ways import FLEX, WAYS, FlexSpans
from mrpo_scale.logps.layer_masks import layer_masks
from mrpo_scale.logps.sequence_parallel import RowOfGroup, SequenceGroup
from mrpo_scale.logps.span_attention import Spans
from mrpo_scale.logps.varlen_layout import varlen_index, varlen_layout

PROMPT, CHOSEN, REJECTED = 0, 1, 2


@dataclass(frozen=True)
class PairBatch:
    """P pairs ready for one model."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    segment_BL: Tensor  #: which pair (shared prompt) or response (separate) a position belongs to; -1 is padding
    part_BL: Tensor  #: PROMPT, CHOSEN or REJECTED
    logit_index_T: Tensor  #: flat index into [B*L], or a group's rank's part of it, of the position that predicts each scored token
    labels_T: Tensor
    cu_seqlens: Tensor  #: [2P+1] int32 boundaries of the responses in T
    bounds: tuple[int, ...]  #: [P+1] boundaries of the pairs in T, which the host knows without asking the device
    positions: tuple[int, ...]  #: [P] that each pair takes, padding left out
    shared_prompt: bool
    spans: Spans | None  #: where segments lie end to end, B = 1; None: padded rows
    varlen_index: Tensor | None = (
        None  #: the same for a variable-length attention call; see :func:`~.varlen_layout.varlen_index`
    )
    group: SequenceGroup | None = None  #: that computes the row; see :func:`over_group`
    lengths_P2: Tensor | None = None  #: scored tokens of whole responses, where only a part of them is this rank's

    @property
    def num_pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2

    @property
    def response_lengths(self) -> Tensor:
        """[P, 2]: scored tokens of each pair's chosen and rejected."""
        return self.cu_seqlens.diff().view(-1, 2) if self.lengths_P2 is None else self.lengths_P2

    @property
    def num_tokens(self) -> int:
        """Positions that this rank computes and that are not padding."""
        mine, total = self.own_tokens, sum(self.positions)
        return total if self.group is None else min(mine.stop, total) - min(mine.start, total)

    @property
    def own_tokens(self) -> slice:
        """The positions of each row that this rank computes: all, but of a sequence group's row."""
        return slice(None) if self.group is None else self.group.tokens(self.input_ids_BL.shape[1])

    @property
    def num_positions(self) -> int:
        """Positions that this rank computes, padding included."""
        return self.input_ids_BL.numel() // (1 if self.group is None else self.group.size)

    def to(self, device: torch.device | str) -> PairBatch:
        """On ``device``, in one copy that nobody waits for."""
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        there = send_together(tensors.values(), torch.device(device))
        moved: dict[str, Any] = dict(zip(tensors, there, strict=True))
        return replace(self, **moved)


def segment_length(pair: PairTokens, shared_prompt: bool) -> int:
    """Positions that the longest row of this pair needs."""
    chosen, rejected = len(pair.chosen_ids), len(pair.rejected_ids)
    return len(pair.prompt_ids) + (chosen + rejected if shared_prompt else max(chosen, rejected))


def collate_pairs(
    pairs: Sequence[PairTokens],
    *,
    shared_prompt: bool,
    end_to_end: bool = False,
    pad_token_id: int = 0,
    group: SequenceGroup | None = None,
) -> PairBatch:
    """Lay P >= 1 pairs out as rows; the order of the responses in the result is the order of ``pairs``.

    Args:
        group: that computes the row, end to end then; all of its ranks have these pairs.
    """
    segments = _segments(pairs, shared_prompt)
    lengths = [sum(len(ids) for ids, _ in segment) for segment in segments]
    rows, width = _rows(lengths, shared_prompt, end_to_end, 1 if group is None else group.size)
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
    counts = [len(ids) for _, ids in responses]
    per_pair = 1 if shared_prompt else 2  # segments
    spans = _spans(segments, shared_prompt, width - sum(lengths)) if end_to_end else None
    batch = PairBatch(
        input_ids_BL=input_ids_BL,
        position_ids_BL=position_ids_BL,
        segment_BL=segment_BL,
        part_BL=part_BL,
        logit_index_T=torch.tensor([i for index, _ in responses for i in index], dtype=torch.long),
        labels_T=torch.tensor([i for _, ids in responses for i in ids], dtype=torch.long),
        cu_seqlens=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        bounds=tuple([0, *accumulate(counts)][::2]),
        positions=tuple(sum(lengths[i : i + per_pair]) for i in range(0, len(lengths), per_pair)),
        shared_prompt=shared_prompt,
        spans=spans,
        varlen_index=None if spans is None else varlen_index(spans.lengths),
    )
    return batch if group is None else over_group(batch, group)


def _segments(pairs: Sequence[PairTokens], shared_prompt: bool) -> list[list[tuple[Sequence[int], int]]]:
    """Texts that see nothing of each other: their parts, as (ids, PROMPT or a response)."""
    if shared_prompt:
        return [[(p.prompt_ids, PROMPT), (p.chosen_ids, CHOSEN), (p.rejected_ids, REJECTED)] for p in pairs]
    return [
        [(p.prompt_ids, PROMPT), (ids, part)]
        for p in pairs
        for ids, part in ((p.chosen_ids, CHOSEN), (p.rejected_ids, REJECTED))
    ]


def _rows(lengths: Sequence[int], shared_prompt: bool, end_to_end: bool, multiple: int) -> tuple[list[list[int]], int]:
    """(segments of each row, positions of a row); of one end to end a multiple of ``multiple``."""
    if end_to_end:
        return [list(range(len(lengths)))], -(-sum(lengths) // multiple) * multiple
    width = max(lengths)
    return packed_rows(lengths, width) if shared_prompt else [[s] for s in range(len(lengths))], width


def _spans(segments: Sequence[Sequence[tuple[Sequence[int], int]]], shared_prompt: bool, padding: int) -> Spans:
    """``padding`` at the row's end is a text of its own."""
    lengths = [tuple(len(ids) for ids, _ in segment) for segment in segments]
    texts = tuple((n[0], n[1:]) if shared_prompt else (sum(n), ()) for n in lengths)
    return Spans((*texts, (padding, ())) if padding else texts)


def over_group(batch: PairBatch, group: SequenceGroup) -> PairBatch:
    """One row end to end, of a length that ``group.size`` divides, as its rank computes it: of the scored tokens those that it
    predicts, so that ``cu_seqlens`` has its part of every response, which may be empty."""
    assert batch.spans is not None and batch.input_ids_BL.shape[1] % group.size == 0
    mine = group.tokens(batch.input_ids_BL.shape[1])
    here_T = (batch.logit_index_T >= mine.start) & (batch.logit_index_T < mine.stop)
    before_T = torch.cat([torch.zeros(1, dtype=torch.int32), here_T.cumsum(0, dtype=torch.int32)])
    return replace(
        batch,
        logit_index_T=batch.logit_index_T[here_T] - mine.start,
        labels_T=batch.labels_T[here_T],
        cu_seqlens=before_T[batch.cu_seqlens.long()],
        lengths_P2=batch.response_lengths,
        group=group,
    )


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


def is_flash(config: PretrainedConfig) -> bool:
    """Whether attention is transformers' own call of a flash-attention that has no way of ours: version 4, or one of the hub."""
    return "flash" in str(config._attn_implementation)


def attention_inputs(batch: PairBatch, model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments that tell ``model`` which positions of ``batch`` see each other."""
    if batch.group is not None:
        inputs = attention_inputs(replace(batch, group=None), model)
        return {**inputs, "spans": RowOfGroup(inputs["spans"], batch.group)}
    config = model.config
    if batch.spans is None and not batch.shared_prompt:
        # Rows are padded at their ends, which nothing before them sees. A mask, or positions, would be looked at by the host.
        return {"attention_mask": None, "position_ids": None}
    if batch.spans is None:
        return {"attention_mask": attention_mask(batch, model)}
    if is_flash(config):
        layout = varlen_layout(batch.spans.lengths, _index(batch))
        boundaries = {"cu_seq_lens_q": layout.cu_q, "cu_seq_lens_k": layout.cu_k}
        return {"attention_mask": None, **boundaries, "max_length_q": layout.max_q, "max_length_k": layout.max_k}
    masks = layer_masks(model)
    unused: Any = batch.segment_BL.new_zeros(1, 1, 1, 1)  # a 4-D mask is passed on as it is: none is made
    if masks.by_name:
        unused = dict.fromkeys(masks.kinds)
    spans: Any = batch.spans
    if config._attn_implementation == FLEX:
        spans = FlexSpans(batch.segment_BL[0], batch.part_BL[0], batch.position_ids_BL[0])
    elif config._attn_implementation in WAYS:
        spans = varlen_layout(batch.spans.lengths, _index(batch))
    return {"attention_mask": unused, "spans": spans}


def _index(batch: PairBatch) -> Tensor:
    assert batch.varlen_index is not None, "laid out without collate_pairs"
    return batch.varlen_index


def attention_mask(batch: PairBatch, model: PreTrainedModel) -> Tensor | dict[str, Tensor]:
    """The mask that ``model`` takes for padded rows: [B, L] for separate responses, else [B, 1, L, L] or a dict of them.

    Boolean (True = seen) under ``sdpa``; additive in the model's dtype under ``eager``, which adds the mask to the scores.
    """
    if not batch.shared_prompt:
        return (batch.segment_BL >= 0).long()
    masks, config = layer_masks(model), model.config.get_text_config()
    visible_BLL = _visible(batch)
    seen = {"full_attention": lambda: visible_BLL}
    seen["sliding_attention"] = lambda: _in_window(batch, visible_BLL, config.sliding_window)
    seen["chunked_attention"] = lambda: _in_chunk(batch, visible_BLL, config.attention_chunk_size)
    made = {kind: _as_mask(seen[kind](), model.config, model.dtype) for kind in masks.kinds}
    return made if masks.by_name else made[masks.kinds[0]]


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


def _in_chunk(batch: PairBatch, seen_BLL: Tensor, chunk: int) -> Tensor:
    """Restrict to keys of the query's own chunk of ``chunk`` positions."""
    chunk_BL = batch.position_ids_BL // chunk
    return seen_BLL & (chunk_BL[:, :, None] == chunk_BL[:, None, :])


def _as_mask(seen_BLL: Tensor, config: PretrainedConfig, dtype: torch.dtype) -> Tensor:
    if config._attn_implementation == "sdpa":
        return seen_BLL[:, None]
    return torch.zeros_like(seen_BLL, dtype=dtype).masked_fill_(~seen_BLL, torch.finfo(dtype).min)[:, None]
