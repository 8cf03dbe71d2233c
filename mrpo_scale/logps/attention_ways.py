"""Attention over pairs end to end on a GPU: one call per layer, by whichever kernel is here.

Each *way* is an attention function of transformers under a name of its own, so a model's config says which one it has. Given
``spans`` (what :func:`~mrpo_scale.logps.pair_batch.attention_inputs` makes of a batch) it is one call of its kernel over all pairs;
without them (generation, plain forwards) it is sdpa, or plain products where scores are soft-capped or have sinks. Which way a
model gets is decided in :mod:`~mrpo_scale.logps.attention_choice`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mrpo_scale.logps.masked_attention import masked_attention, varlen_reference
from mrpo_scale.logps.sequence_parallel import with_exchange
from mrpo_scale.logps.varlen_layout import VarlenLayout


class Kernel(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: VarlenLayout,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """query [T, heads, d], key and value [K, heads of keys, d] to [T, heads, d]. ``window``: positions seen, one's own too."""


@dataclass(frozen=True)
class Way:
    """One kernel, and what it can do. A kernel of None: FlexAttention, which takes a mask in place of a layout."""

    name: str  #: of the attention in a model's config. Not "flash...": transformers looks such names up elsewhere
    called: str  #: in messages
    kernel: Kernel | None
    package: str | None = None  #: that has to be installed
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    any_value: bool = False  #: takes values of another width than keys
    half_only: bool = True  #: takes bfloat16 and float16 alone
    largest_head: int | None = 256


def _left(window: int | None) -> tuple[int, int]:
    return (-1 if window is None else window - 1, 0)


@cache
def _takes_grouped_heads(function: Callable[..., Any]) -> bool:
    """Torch 2.11's varlen_attn has no ``enable_gqa``: there keys are repeated for their queries' heads."""
    return "enable_gqa" in inspect.signature(function).parameters


def _torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, *, scale: Any, window: Any, **_: Any
) -> Tensor:
    options: dict[str, Any] = {"scale": scale, "window_size": _left(window)}
    if query.shape[1] != key.shape[1]:
        if _takes_grouped_heads(varlen_attn):
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    output = varlen_attn(query, key, value, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, **options)
    assert isinstance(output, Tensor)  # no sums of scores were asked for
    return output


def _flash_kernel(package: str) -> Kernel:
    """Of flash-attn 2 or 3: the same function in two packages."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: VarlenLayout,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        dropout: float,
    ) -> Tensor:
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True, "window_size": _left(window)}
        options |= {"softcap": softcap} if softcap is not None else {}
        options |= {"dropout_p": dropout} if dropout else {}
        output = importlib.import_module(package).flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=layout.cu_q,
            cu_seqlens_k=layout.cu_k,
            max_seqlen_q=layout.max_q,
            max_seqlen_k=layout.max_k,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **options,
        )
        return output[0] if isinstance(output, tuple) else output  # some versions add the log of the scores' sum

    return kernel


def _reference_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, *, window: Any, **options: Any
) -> Tensor:
    return varlen_reference(
        *(query, key, value, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k),
        window_size=_left(window),
        enable_gqa=True,
        **options,
    )


FLEX, REFERENCE = "flex_spans", "reference_spans"
#: In the order in which they are tried; the last, which needs no GPU and is slow, is taken only where it is asked for.
WAYS = {
    way.name: way
    for way in (
        Way("fa3_spans", "flash-attn 3", _flash_kernel("flash_attn_interface"), "flash_attn_interface", softcap=True),
        Way("varlen_spans", "torch's varlen_attn", _torch_kernel),
        Way("fa2_spans", "flash-attn 2", _flash_kernel("flash_attn"), "flash_attn", softcap=True, dropout=True),
        Way(FLEX, "FlexAttention", None, softcap=True, sinks=True, any_value=True, half_only=False, largest_head=None),
        Way(
            REFERENCE,
            "plain products, sequence by sequence",
            _reference_kernel,
            softcap=True,
            sinks=True,
            dropout=True,
            any_value=True,
            half_only=False,
            largest_head=None,
        ),
    )
}


@dataclass(frozen=True)
class FlexSpans:
    """Who sees whom in one row, as FlexAttention asks: by position, for the blocks that need it."""

    segment_L: Tensor  #: which pair or response a position belongs to
    part_L: Tensor  #: 0 for a trunk, else which branch
    position_L: Tensor
    _masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False, repr=False)

    def seen(self, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
        segment, part, position = self.segment_L, self.part_L, self.position_L

        def mask(batch: Any, head: Any, q: Any, k: Any) -> Tensor:
            same_text = (segment[q] == segment[k]) & ((part[k] == 0) | (part[q] == part[k]))
            seen = same_text & (q >= k)
            return seen if window is None else seen & (position[q] - position[k] < window)

        return mask

    def block_mask(self, window: int | None) -> BlockMask:
        """Made once for all layers of this window."""
        if window not in self._masks:
            length, device = len(self.segment_L), self.segment_L.device
            self._masks[window] = create_block_mask(
                self.seen(window), None, None, length, length, device=device, _compile=device.type == "cuda"
            )
        return self._masks[window]


def attention_function(way: Way) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function of transformers: query, key, value [B, heads, L, d] to [B, L, heads, d]. With ``spans``, B is 1."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        spans: VarlenLayout | FlexSpans | None = None,
        sliding_window: int | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if spans is None:
            return _without_spans(
                *(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux), **kwargs
            )
        query, key, value = _as_computed(query, key, value)
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux}
        if isinstance(spans, FlexSpans):
            mask = spans.block_mask(sliding_window)
            return flex_attention_forward(module, query, key, value, mask, **options)  # type: ignore[arg-type]
        assert way.kernel is not None
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        output_THd = way.kernel(
            *(query, spans.keys_of(key), spans.keys_of(value), spans),
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
        )
        return output_THd[None], None

    return attention


def _as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In one dtype: under autocast rotations leave queries and keys in float32, which the kernels do not take."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _without_spans(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    output = masked_attention(
        *(query, key, value, attention_mask), scale=scaling, softcap=softcap, sinks=s_aux, dropout=dropout
    )
    return output.transpose(1, 2).contiguous(), None


for _way in WAYS.values():
    AttentionInterface.register(_way.name, with_exchange(attention_function(_way)))
    AttentionMaskInterface.register(_way.name, sdpa_mask)
