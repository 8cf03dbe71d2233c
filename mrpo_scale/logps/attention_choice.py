"""Which attention a model gets for pairs end to end, decided once at start: by what its heads need, what is installed, and a
trial.

A kernel that was never run on this GPU is not believed. Before it is taken it computes three short pairs with the model's own
numbers of heads and columns, forward and backward, and is held against plain products in float64: that finds out another alignment,
a window counted otherwise, a build without the backward. The model's own check (:mod:`~mrpo_scale.logps.self_check`) then goes
through the kernel as a whole.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.logps.attention_ways import FLEX, REFERENCE, WAYS, FlexSpans, Way, attention_function
from mrpo_scale.logps.layer_masks import reaches_attention
from mrpo_scale.logps.pair_batch import is_flash
from mrpo_scale.logps.span_attention import SPAN_ATTENTION
from mrpo_scale.logps.varlen_layout import VarlenLayout, varlen_index, varlen_layout

logger = logging.getLogger(__name__)

#: Attention that a user asks for by transformers' name, and the way that is the same kernel.
SAME_KERNEL = {"flash_attention_2": "fa2_spans", "flash_attention_3": "fa3_spans"}
#: Prompts and responses of the trial: shorter and longer than a kernel's blocks, a single token, the trial's window crossed.
TRIAL = ((5, (3, 4)), (150, (70, 1)), (1, (2, 140)))
TRIAL_WINDOW = 37


@dataclass(frozen=True)
class Needs:
    """What an attention must be able to do for one model."""

    heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype  #: that it computes in
    value_size: int | None = None  #: None: as wide as queries and keys
    softcap: float | None = None
    sinks: bool = False
    dropout: bool = False
    window: bool = False


def choose_end_to_end(
    model: PreTrainedModel,
    device: torch.device,
    *,
    name: str = "the model",
    asked: str | None = None,
    dtype: torch.dtype | None = None,
    dropout: bool = False,
    compiled: bool = False,
    tried: bool = True,
) -> bool:
    """Whether ``model``'s batches should be laid end to end. Where they should, it is given the attention that takes them: on a CPU
    under sdpa span by span, on a GPU the first way of ``WAYS`` that can. Not when it will be compiled, which lengths that change
    with every batch undo.

    Args:
        asked: ``attn_implementation``, where it was typed: that attention and no other.
        dtype: that it computes in; default: the model's own.
        dropout: whether the model keeps its attention dropout while it trains.
        tried: False: nothing is run, as for a GPU that is not here (`mrpo check`).

    Raises:
        ConfigError: what was asked for cannot be had.
    """
    config = model.config
    standing = config._attn_implementation
    default = "sdpa" if model._supports_sdpa else "eager"
    wanted = asked or (None if standing == default else standing)
    reached = reaches_attention(model)
    if wanted in WAYS and not reached:
        raise ConfigError(
            f"`attn_implementation: {wanted}` does not work for {name} ({config.model_type}): pairs of this type do not lie end to "
            "end. Leave the key out."
        )
    if compiled or not reached:
        return _lies_end_to_end(model)
    if device.type == "cpu" and wanted in (None, "sdpa"):
        if standing == "sdpa" and getattr(config, "attn_logit_softcapping", None) is None:  # which sdpa may leave out
            model.set_attn_implementation(SPAN_ATTENTION)
    elif wanted is None:
        model.set_attn_implementation(
            _first(_needs(model, dtype or model.dtype, dropout), device, name, tried) or standing
        )
    elif (way := SAME_KERNEL.get(wanted, wanted)) in WAYS:
        reason = refusal(WAYS[way], _needs(model, dtype or model.dtype, dropout), device, tried)
        if reason:
            raise ConfigError(f"`attn_implementation: {wanted}` does not work for {name}: {reason}. Leave the key out.")
        model.set_attn_implementation(way)
        logger.info("%s: %s, as asked", name, WAYS[way].called)
    return _lies_end_to_end(model)


def head_size(config: PretrainedConfig) -> int:
    """Width of one attention head; of the widest, where layers differ.

    Raises:
        ConfigError: the config does not say it.
    """
    try:
        size = getattr(config, "head_dim", None)
    except RuntimeError:  # what transformers says where the layers' heads differ, as Gemma 4's do
        size = max(layer.head_dim for layer in config.per_layer_config)
    return size or named_size(config, "hidden_size") // named_size(config, "num_attention_heads")


def named_size(config: PretrainedConfig, name: str) -> int:
    """The number ``name`` of a config.

    Raises:
        ConfigError: it has none.
    """
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ConfigError(
            f"the config of model type {config.model_type!r} has no number `{name}`, so its cost cannot be estimated; complete its "
            "config.json or choose a decoder with ordinary attention."
        )
    return value


def _lies_end_to_end(model: PreTrainedModel) -> bool:
    config = model.config
    told = config._attn_implementation in (SPAN_ATTENTION, *WAYS) or is_flash(config)
    return told and reaches_attention(model)


def _needs(model: PreTrainedModel, dtype: torch.dtype, dropout: bool) -> Needs:
    config = model.config.get_text_config()
    heads = named_size(config, "num_attention_heads")
    nope, rope, value = (getattr(config, f"{name}_head_dim", None) for name in ("qk_nope", "qk_rope", "v"))
    latent = None not in (nope, rope, value)  # DeepSeek's attention: values have a width of their own
    return Needs(
        heads=heads,
        key_heads=heads if latent else getattr(config, "num_key_value_heads", None) or heads,
        head_size=nope + rope if latent else head_size(config),  # type: ignore[operator]
        value_size=value if latent else None,
        dtype=dtype,
        softcap=getattr(config, "attn_logit_softcapping", None),
        sinks=any("sink" in name for name, _ in model.named_parameters()),
        dropout=dropout and bool(getattr(config, "attention_dropout", 0.0)),
        window=isinstance(getattr(config, "sliding_window", None), int),
    )


def _first(needs: Needs, device: torch.device, name: str, tried: bool) -> str | None:
    """The first way that can, and a line of the log that says why not the others; None: a mask."""
    reasons: list[str] = []
    for way in WAYS.values():
        if way.name == REFERENCE:
            continue
        reason = refusal(way, needs, device, tried)
        if reason is None:
            logger.info("%s: %s%s", name, way.called, f" (not {'; '.join(reasons)})" if reasons else "")
            return way.name
        reasons.append(f"{way.called}: {reason}")
    logger.info("%s: attention under a mask as large as the row squared (not %s)", name, "; ".join(reasons))
    return None


def refusal(way: Way, needs: Needs, device: torch.device, tried: bool) -> str | None:
    """Why ``way`` cannot serve these heads, or None."""
    if way.package is not None and importlib.util.find_spec(way.package) is None:
        return f"the package {way.package} is not installed"
    if way.name != REFERENCE and device.type != "cuda":
        return f"it needs an NVIDIA GPU, not {device.type}"
    if needs.softcap is not None and not way.softcap:
        return "it has no soft-capped scores"
    if needs.sinks and not way.sinks:
        return "it has no attention sinks"
    if needs.value_size not in (None, needs.head_size) and not way.any_value:
        return f"its values are as wide as its keys, these have {needs.value_size} columns and {needs.head_size}"
    if needs.dropout and not way.dropout:
        return "it has no dropout; set `disable_dropout: true`"
    if way.half_only and needs.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {str(needs.dtype).removeprefix('torch.')}"
    if way.largest_head is not None and needs.head_size > way.largest_head:
        return f"its heads have at most {way.largest_head} columns, these have {needs.head_size}"
    return trial(way, needs, device) if tried else None


# ---- the trial -------------------------------------------------------------------------------------------------------


@cache
def trial(way: Way, needs: Needs, device: torch.device) -> str | None:
    """Run ``way`` on three short pairs, forward and backward. Why it cannot be believed, or None. Reads the device."""
    for window in (None, TRIAL_WINDOW) if needs.window else (None,):
        try:
            off = trial_error(way, needs, device, window)
        except (RuntimeError, ImportError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
            return f"it failed on a few tokens ({type(error).__name__}: {one_line(error)[:200]})"
        allowed = max(
            4 * torch.finfo(needs.dtype).eps, 2e-3
        )  # of their size; TF32 products are as coarse as the second
        if not off <= allowed:
            windowed = f" with a window of {window}" if window else ""
            return f"it differs from plain products{windowed} by {off:.2g} of their size, where rounding makes {allowed:.1g}"
    return None


def trial_error(way: Way, needs: Needs, device: torch.device, window: int | None) -> float:
    """The largest of the relative errors of output and gradients against plain products in float64."""
    index = varlen_index(TRIAL).to(device)
    layout = varlen_layout(TRIAL, index)
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(trunk + sum(branches) for trunk, branches in TRIAL)

    def random(heads: int, columns: int) -> Tensor:
        return torch.randn(1, heads, num_tokens, columns, generator=generator).to(device, needs.dtype)

    values = needs.value_size or needs.head_size
    query, upstream = random(needs.heads, needs.head_size), random(needs.heads, values).transpose(1, 2)
    key, value = random(needs.key_heads, needs.head_size), random(needs.key_heads, values)
    sinks = torch.randn(needs.heads, generator=generator).to(device, needs.dtype) if needs.sinks else None
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]

    def computed(inputs: list[Tensor], spans: VarlenLayout | FlexSpans, of: Way) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        options = {"sliding_window": window, "softcap": needs.softcap, "s_aux": sinks}
        output, _ = attention_function(of)(module, *inputs, None, spans=spans, **options)
        return [output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]

    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        exact = computed([x.double() for x in (query, key, value)], layout, WAYS[REFERENCE])
        got = computed([query, key, value], trial_flex_spans(device) if way.name == FLEX else layout, way)
    off = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
    return max(off)


def trial_flex_spans(device: torch.device) -> FlexSpans:
    """The trial's pairs, as FlexAttention takes them."""
    segment, part, position = [], [], []
    for s, (trunk, branches) in enumerate(TRIAL):
        lengths = (trunk, *branches)
        segment += [s] * sum(lengths)
        part += [j for j, n in enumerate(lengths) for _ in range(n)]
        position += [(trunk if j else 0) + i for j, n in enumerate(lengths) for i in range(n)]
    segment_L, part_L, position_L = (torch.tensor(x, device=device) for x in (segment, part, position))
    return FlexSpans(segment_L, part_L, position_L)
