"""What a policy whose rows lie over several ranks must be like: `sequence_parallel_size` against its config, without weights."""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.logps.attention_choice import choose_end_to_end, named_size
from mrpo_scale.logps.attention_ways import WAYS
from mrpo_scale.logps.layer_masks import layer_masks, why_not_shared
from mrpo_scale.logps.routers import router_loss_coef
from mrpo_scale.logps.span_attention import SPAN_ATTENTION
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.source import check_config
from mrpo_scale.models.stored import build_on_meta


def check_sequences(plan: RunPlan, args: MRPOConfig, world_size: int, device: torch.device) -> None:
    """Refuse a policy, or a world, that a sequence group cannot take.

    Raises:
        ConfigError: the key does not divide the ranks or the heads, `max_length` is beyond the policy's context, or its layers are
            not the attention over spans that heads are exchanged around.
    """
    size = args.sequence_parallel_size
    if size == 1:
        return
    config = check_config(plan.policy)
    _check_sizes(config, args, world_size)
    model = build_on_meta(plan.policy, config)
    choose_end_to_end(model, device, name="policy", asked=args.attn_implementation, tried=False)
    check_attention(model, args)


def check_attention(model: PreTrainedModel, args: MRPOConfig) -> None:
    """Refuse a policy, its attention chosen, that has another than the one over spans. Its routers, too, where they have a loss.

    Raises:
        ConfigError: names its type, and why.
    """
    size, config = args.sequence_parallel_size, model.config
    if size == 1:
        return
    if config._attn_implementation not in (SPAN_ATTENTION, *WAYS):
        remedy = "leave `attn_implementation` out, or set it to 1" if args.attn_implementation else "set it to 1"
        raise ConfigError(
            f"`sequence_parallel_size: {size}` does not work for the policy ({config.model_type} under "
            f"{config._attn_implementation} attention): {_why_not(model)}; {remedy}."
        )
    if router_loss_coef(model, args.router_aux_loss_coef):
        raise ConfigError(
            f"`sequence_parallel_size: {size}` does not work with the loss of the policy's routers ({config.model_type}), a "
            "product of means over all tokens of a batch, of which a rank has a part; set `router_aux_loss_coef: 0`."
        )


def _why_not(model: PreTrainedModel) -> str:
    reason = why_not_shared(model)
    if reason is None and "chunked_attention" in layer_masks(model).kinds:
        reason = "its attention goes by chunks"
    return reason or "heads are exchanged around attention over spans, which it does not get here"


def _check_sizes(config: PretrainedConfig, args: MRPOConfig, world_size: int) -> None:
    size, text = args.sequence_parallel_size, config.get_text_config()
    heads = named_size(text, "num_attention_heads")
    both = _among(math.gcd(world_size, heads))
    if world_size % size:
        raise ConfigError(
            f"`sequence_parallel_size: {size}` does not divide the {world_size} rank{'s' * (world_size > 1)} of the run; choose "
            f"{both}, or start another number of processes."
        )
    if heads % size:
        raise ConfigError(
            f"`sequence_parallel_size: {size}` does not divide the policy's {heads} attention heads, of which each rank takes an "
            f"equal part; choose {both}."
        )
    context = getattr(text, "max_position_embeddings", None)
    if isinstance(context, int) and args.max_length is not None and args.max_length > context:
        raise ConfigError(
            f"`max_length: {args.max_length}` with `sequence_parallel_size: {size}`: the policy's own context is {context} tokens "
            f"(`max_position_embeddings` of its config.json), longer pairs would be left out; set `max_length` to {context} or "
            "less, or name a policy with a longer context."
        )


def _among(number: int) -> str:
    """Its divisors, as a sentence has them."""
    *some, last = [n for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(map(str, some))} or {last}" if some else str(last)
