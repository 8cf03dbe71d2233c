"""Responses that a model generates, and samples of the policy while it trains: drawn from its own distribution and no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from mrpo_scale.logps.attention_ways import WAYS
from mrpo_scale.logps.span_attention import SPAN_ATTENTION


def pad_left(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """[B, L] of token ids and of their mask: a model continues from the last column."""
    width = max(map(len, ids))
    input_ids_BL = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids])
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return input_ids_BL, mask_BL


def until(row: list[int], ends: set[int]) -> list[int]:
    """``row`` up to the first of ``ends``, without it."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


@torch.no_grad()
def sample_responses(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    ends: set[int],
    max_new_tokens: int,
    pad_token_id: int,
    device: torch.device,
    seed: int,
    synced: bool = False,
) -> list[list[int]]:
    """One response to each of B prompts, token by token from the model's softmax: temperature 1, nothing cut off, no dropout.

    The random numbers are ``seed``'s; the generators of the run stay where they are.

    Args:
        ends: tokens after which a response is over. A response has its end, unless it was cut after ``max_new_tokens``.
        synced: collective over the world: every rank runs as many forwards as the one with the longest response.
    """
    input_ids_BL, mask_BL = pad_left(prompts, pad_token_id)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,  # None would become 50
        top_p=1.0,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad_token_id,
    )
    generators = [device] if device.type == "cuda" else []
    with _plain(policy) as model, torch.random.fork_rng(devices=generators):
        torch.manual_seed(seed)
        generated_BL = model.generate(
            input_ids=input_ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            generation_config=config,
            synced_gpus=synced,
        )[:, input_ids_BL.shape[1] :]
    return [_with_end(row, ends) for row in generated_BL.tolist()]


def _with_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: len(until(row, ends)) + 1]


@contextmanager
def _plain(policy: nn.Module) -> Iterator[Any]:
    """The policy as transformers generates with it: in evaluation mode, with the forward of its class (whose arguments ``generate``
    reads: under another's it would not count positions from the end of the padding), an attention that takes masks, and none of
    what its generation_config.json says, which would fill in whatever is not set."""
    model: Any = policy
    if not isinstance(model, PreTrainedModel):
        model = model.get_base_model()  # peft's, which has put the adapter into the layers of this one
    attention, training, known = model.config._attn_implementation, policy.training, model.generation_config
    forward = model.__dict__.pop("forward", None)
    swapped = attention in (SPAN_ATTENTION, *WAYS)
    policy.eval()
    model.generation_config = GenerationConfig()
    if swapped:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield model
    finally:
        if swapped:
            model.set_attn_implementation(attention)
        if forward is not None:
            model.forward = forward
        model.generation_config = known
        policy.train(training)
