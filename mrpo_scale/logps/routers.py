"""How evenly the routers of a mixture of experts spread its tokens: the auxiliary loss of its own class, and what it looks like.

The loss is transformers' (Switch Transformer, equations 4 to 6): over all layers, experts times the sum of (share of tokens sent to
an expert) times (mean probability of it). A product of means over a batch, so what two halves of a batch say does not add up to
what the whole says: it depends on how pairs are cut into micro-batches and ranks, unlike everything else in a step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mrpo_scale.logps.pair_batch import PairBatch


class RouterBalance(NamedTuple):
    """Scalars of one batch, padding left out; 1 in ``loss`` over top-k and in ``busiest`` is an even spread."""

    loss: Tensor  #: differentiable
    busiest: Tensor  #: tokens of a layer's busiest expert, relative to an even spread, mean over layers
    idle: Tensor  #: share of experts that no token was sent to, mean over layers


def has_router_loss(model_class: type[PreTrainedModel]) -> bool:
    """Whether transformers has an auxiliary loss for this class: DeepSeek's kin balance by a bias instead, which nothing trains."""
    loss = _loss_function(model_class)
    return loss is not None and {"gate_logits", "num_experts", "top_k", "attention_mask"} == set(
        inspect.signature(loss).parameters
    )


def router_loss_coef(model: PreTrainedModel, coef: float | None) -> float:
    """What the auxiliary loss is weighted with: ``coef``, or where that is None what the model's config says; 0: there is none."""
    if coef is None:
        coef = float(getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0)
    return coef if has_router_loss(type(model)) and hasattr(model, "num_experts_per_tok") else 0.0


def router_balance(model: PreTrainedModel, logits: Sequence[Tensor], pairs: PairBatch) -> RouterBalance:
    """Of the router logits [B*L, experts] of each layer that routes."""
    experts, top_k = int(model.num_experts), int(model.num_experts_per_tok)  # type: ignore[arg-type]
    inside_BL = pairs.segment_BL >= 0
    loss: Any = _loss_function(type(model))
    balance = loss(tuple(logits), num_experts=experts, top_k=top_k, attention_mask=inside_BL)
    with torch.no_grad():
        chosen = [layer.reshape(-1, experts)[inside_BL.reshape(-1)].topk(top_k, dim=-1).indices for layer in logits]
        counts = torch.stack([torch.bincount(c.reshape(-1), minlength=experts) for c in chosen]).float()
        busiest = (counts.amax(-1) * experts / counts.sum(-1)).mean()
        idle = (counts == 0).float().mean()
    return RouterBalance(balance, busiest, idle)


def _loss_function(model_class: type[PreTrainedModel]) -> Any:
    return getattr(sys.modules.get(model_class.__module__), "load_balancing_loss_func", None)
