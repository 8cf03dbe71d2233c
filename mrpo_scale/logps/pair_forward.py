"""(model, batch of pairs) -> log-probs [P, 2]: one pass of the model's body over the pairs, then the fused head.

A causal LM from transformers is given, in place, a forward that also takes ``pairs=PairBatch`` and returns log-probs instead of
logits. In place, because wrapping the policy in another module would change its state-dict names; as its own forward, because
ZeRO-3, FSDP2 and accelerate hang their gathers and hooks on exactly that call, and on the call of the module that owns the head's
weight.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from mrpo_kernels import LinearPreferenceLoss, linear_preference_loss, sequence_logps
from mrpo_kernels.cpu_linear import CpuLinear, has_fast_products
from mrpo_kernels.linear_preference_loss import LossOfPairs
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.logps.layer_masks import body_of, first_position, supports_shared_prompt, why_not_shared
from mrpo_scale.logps.logit_transform import logit_transform
from mrpo_scale.logps.pair_batch import PairBatch, attention_inputs
from mrpo_scale.logps.routers import RouterBalance, router_balance

logger = logging.getLogger(__name__)


def every_token(labels_T: Tensor) -> Tensor:
    """[T+1] boundaries that make a response of each token, where log-probs of tokens are wanted."""
    return torch.arange(len(labels_T) + 1, dtype=torch.int32, device=labels_T.device)


class FusedHead(nn.Linear):
    """A model's output head that, given labels, returns log-probs of whole responses. Without labels it is ``nn.Linear``."""

    softcap: float | None
    logit_scale: float
    impl: str
    tap: Any = None  #: what the self-check looks through while it runs

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels_T: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        loss_of_pairs: LossOfPairs | None = None,
        bounds: Sequence[int] | None = None,
        per_token: bool = False,
    ) -> Tensor | LinearPreferenceLoss:
        if labels_T is None or cu_seqlens is None:
            logits = super().forward(hidden)
            return logits if self.tap is None else self.tap.plain(hidden, logits)
        return self._score(hidden, labels_T, cu_seqlens, loss_of_pairs, bounds, per_token)

    @torch.compiler.disable  # large products in chunks whose number depends on the batch: nothing to fuse, much to recompile
    def _score(
        self,
        hidden: Tensor,
        labels_T: Tensor,
        cu_seqlens: Tensor,
        loss_of_pairs: LossOfPairs | None,
        bounds: Sequence[int] | None,
        per_token: bool,
    ) -> Tensor | LinearPreferenceLoss:
        if self.tap is not None:
            self.tap.scored(hidden)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if weight.dtype != hidden.dtype:  # under autocast the body is bf16 and the head's master weight float32
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        options: Any = {"bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        if loss_of_pairs is not None:
            options |= {"bounds": bounds, "per_token": per_token}
            return linear_preference_loss(hidden, weight, labels_T, cu_seqlens, loss_of_pairs, **options)
        if per_token:
            cu_seqlens = every_token(labels_T)
        return sequence_logps(hidden, weight, labels_T, cu_seqlens, impl=self.impl, **options)


def enable_pair_scoring(model: PreTrainedModel, name: str, impl: str = "auto", *, offload: bool = False) -> None:
    """Give ``model``, in place, a forward that takes ``pairs=``; every other call is what it was.

    Args:
        name: how errors call the model.
        impl: of the head: ``auto``, ``triton`` or ``torch``.
        offload: keep what the body's forward saves for its backward in host memory; under gradient checkpointing, whose own
            hooks keep all else away, the inputs of its layers.

    Raises:
        ConfigError: the model has no plain linear output head, or no body of its own.
    """
    head = model.get_output_embeddings()
    if type(head) is FusedHead:
        return
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"{name} ({type(model).__name__}): its output head is {type(head).__name__}, not a plain linear layer, "
            "so its log-probs cannot be computed here; choose a causal language model with a linear head."
        )
    body_of(model)
    head.__class__ = FusedHead
    fused = cast(FusedHead, head)
    fused.softcap, fused.logit_scale = logit_transform(model.config)
    fused.impl = impl
    if has_fast_products():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = CpuLinear
    plain_forward, first = model.forward, first_position(model)
    saved_where = partial(save_on_cpu, pin_memory=torch.cuda.is_available()) if offload else nullcontext

    def forward(
        self: PreTrainedModel,
        *args: Any,
        pairs: PairBatch | None = None,
        with_head: bool = True,
        loss_of_pairs: LossOfPairs | None = None,
        with_routers: bool = False,
        per_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        if pairs is None:
            return plain_forward(*args, **kwargs)
        with saved_where():
            outputs = _run_body(self, pairs, first, **({"output_router_logits": True} if with_routers else {}))
        # Only the positions that predict a response token reach the head.
        hidden_TD = outputs.last_hidden_state.flatten(0, 1).index_select(0, pairs.logit_index_T)
        if not with_head:
            return hidden_TD
        responses = (pairs.labels_T, pairs.cu_seqlens)
        scored = self.get_output_embeddings()(hidden_TD, *responses, loss_of_pairs, pairs.bounds, per_token)
        scored = scored.view(-1, 2) if loss_of_pairs is None and not per_token else scored
        scored = scored if pairs.group is None else pairs.group.total(scored)
        return (scored, router_balance(self, outputs.router_logits, pairs)) if with_routers else scored

    model.forward = types.MethodType(forward, model)


def _run_body(model: PreTrainedModel, pairs: PairBatch, first: int, **options: Any) -> Any:
    mine = pairs.own_tokens
    position_ids_Bn = pairs.position_ids_BL[:, mine]
    inputs = {
        "position_ids": position_ids_Bn + first if first else position_ids_Bn,
        **attention_inputs(pairs, model),
        **options,
    }
    return body_of(model)(input_ids=pairs.input_ids_BL[:, mine], use_cache=False, **inputs)


def choose_shared_prompt(setting: str, model: PreTrainedModel, name: str) -> bool:
    """Resolve ``shared_prompt: auto|true|false`` for one model and log the choice, with its reason, once.

    Raises:
        ConfigError: ``true`` for a model or attention that cannot be masked per pair.
    """
    config = model.config
    reason = why_not_shared(model)
    if reason is None and not supports_shared_prompt(model):
        reason = f"{config._attn_implementation} attention takes no mask"
    if setting == "true" and reason is not None:
        raise ConfigError(
            f"`shared_prompt: true` does not work for {name} ({config.model_type} under {config._attn_implementation} attention): "
            f"{reason}. Use `shared_prompt: auto`."
        )
    shared = reason is None and setting != "false"
    way = "one forward over prompt, chosen and rejected" if shared else "two sequences per pair"
    because = f", since {reason}" if reason is not None else ""
    logger.info("%s (%s, %s attention): %s%s", name, config.model_type, config._attn_implementation, way, because)
    return shared


def score_pairs(model: nn.Module, pairs: PairBatch) -> Tensor:
    """Log-probs [P, 2] (chosen, rejected) in float32. ``model`` may be wrapped (DeepSpeed, DDP, FSDP2)."""
    return model(pairs=pairs)


def score_tokens(model: nn.Module, pairs: PairBatch) -> Tensor:
    """Log-probs [T] of the scored tokens, else as :func:`score_pairs`, whose sums they have."""
    return model(pairs=pairs, per_token=True)


def score_pairs_and_routers(model: nn.Module, pairs: PairBatch) -> tuple[Tensor, RouterBalance]:
    """As :func:`score_pairs`, of a model that :func:`~mrpo_scale.logps.routers.has_router_loss`."""
    logps_P2, balance = model(pairs=pairs, with_routers=True)
    return logps_P2, RouterBalance(*balance)


def preference_step(
    model: nn.Module,
    pairs: PairBatch,
    loss_of_pairs: LossOfPairs,
    *,
    with_routers: bool = False,
    per_token: bool = False,
) -> tuple[LinearPreferenceLoss, RouterBalance | None]:
    """The loss with the head's gradients made in the forward, see ``linear_preference_loss``; on demand what the routers did."""
    options = {"loss_of_pairs": loss_of_pairs, "per_token": per_token}
    if not with_routers:
        return LinearPreferenceLoss(*model(pairs=pairs, **options)), None
    scored, balance = model(pairs=pairs, **options, with_routers=True)
    return LinearPreferenceLoss(*scored), RouterBalance(*balance)


def response_hidden(model: nn.Module, pairs: PairBatch) -> Tensor:
    """Hidden states [T, D] that predict the response tokens: the model's body without its head. ``model`` may be wrapped."""
    return model(pairs=pairs, with_head=False)
