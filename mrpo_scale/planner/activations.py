"""What a forward keeps for its backward, by a formula over the layers that a dense attention decoder is made of.

Per position and decoder layer, with D hidden, F the MLP's width, H heads and G key-value heads of d, b bytes of the compute dtype:

    linear layers   b D for each distinct input of attention and MLP, b F for the input of the down projection
    norms           RMSNorm (4 + b) D: the float32 input and the normalised value; where the weight multiplies in float32 (Gemma,
                    OLMo 2) 8 D; LayerNorm b D, Cohere's 12 D; the same over q (H d) and k (G d) where a model norms those
    MLP             gated: b 3 F (gate, up, activation); plain: b F, and 3 more where GELU is spelt out (GPT-2)
    attention       b 4 H d for q, k, v (repeated to all heads) and the output; fused kernels 4 H for the logsumexp, and b (H + G) d
                    where v is a view into one product for q, k and v. Span by span, a CPU's: b 3 H d for q, the outputs of its
                    calls and their concatenation, b 2 G d for k and v, where a prompt counts once for each response

and per (query, key) pair under a mask: the mask, which sdpa turns into b bytes anew in every layer, span by span once for all;
under eager b H for the
softmax, 4 H more in half precision, b H more under a softcap. With gradient checkpointing a layer keeps its input, b D, and one
layer at a time has all of the above again.

tests/planner/test_activations.py compares with what autograd saves, counted through ``saved_tensors_hooks``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mrpo_scale.logps.attention_choice import head_size
from mrpo_scale.logps.flops import SKIPS_THE_MASKED, Work
from mrpo_scale.logps.layer_masks import body_of, decoder_layers
from mrpo_scale.logps.span_attention import SPAN_ATTENTION

_NORMS_IN_FLOAT32 = {"CohereLayerNorm": 3, "GemmaRMSNorm": 2, "Gemma2RMSNorm": 2, "Gemma3RMSNorm": 2, "Olmo2RMSNorm": 2}


@dataclass(frozen=True)
class Kept:
    """Numbers kept: in the compute dtype, in float32 whatever that is, and in float32 only where that is another dtype."""

    compute: int = 0
    float32: int = 0
    widened: int = 0

    def bytes(self, itemsize: int) -> int:
        return self.compute * itemsize + (self.float32 + self.widened * (itemsize < 4)) * 4

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.compute + other.compute, self.float32 + other.float32, self.widened + other.widened)


@dataclass(frozen=True)
class Activations:
    """The formula's coefficients for one model."""

    num_layers: int
    key_heads: int
    layer_position: Kept  #: per position, in one decoder layer
    layer_key: Kept  #: per position that attention reads keys and values of, in one decoder layer
    layer_score: Kept  #: per (query, key) pair under a mask, in one decoder layer
    layer_input: Kept  #: per position: what checkpointing keeps of a layer
    outside: Kept  #: per position, once: final norm, rotary tables
    response_token: Kept  #: what the head keeps
    shared_score: Kept = Kept()  #: per (query, key) pair under a mask that all layers share

    def kept(self, work: Work, itemsize: int, *, checkpointing: bool, ranks: int = 1) -> int:
        """Bytes that a forward leaves for its backward; ``work``: of one of the ``ranks`` of a sequence group."""
        layer = (
            self.layer_input.bytes(itemsize) * work.positions if checkpointing else self._layer(work, itemsize, ranks)
        )
        once = self.outside.bytes(itemsize) * work.positions + (0 if checkpointing else self._shared(work, itemsize))
        return self.num_layers * layer + once + self.response_token.bytes(itemsize) * work.response_tokens

    def layer(self, work: Work, itemsize: int, *, ranks: int = 1) -> int:
        """Bytes of one decoder layer, which is what checkpointing computes again, one layer at a time."""
        return self._layer(work, itemsize, ranks) + self._shared(work, itemsize)

    def _layer(self, work: Work, itemsize: int, ranks: int) -> int:
        # Queries are a view into what came from the other ranks, which keeps the keys and values beside them.
        keys = work.keys + (work.positions if ranks > 1 else 0)
        repeats = math.lcm(self.key_heads, ranks) // self.key_heads
        return (
            self.layer_position.bytes(itemsize) * work.positions
            + self.layer_key.bytes(itemsize) * keys * repeats
            + self.layer_score.bytes(itemsize) * work.masked
        )

    def _shared(self, work: Work, itemsize: int) -> int:
        return self.shared_score.bytes(itemsize) * work.masked


def activations_of(model: PreTrainedModel) -> Activations:
    """From the modules of a causal LM, on the meta device or loaded."""
    layer, layers = decoder_layers(model)[0], len(decoder_layers(model))
    hidden = model.config.get_text_config().hidden_size
    attention, key, score = _attention(model, layer)
    outside = Kept(compute=2 * head_size(model.config.get_text_config()))
    for module in body_of(model).children():
        if _is_norm(module):
            outside += _norm(module, hidden)
    return Activations(
        num_layers=layers,
        key_heads=_key_heads(model.config.get_text_config()),
        layer_position=attention + _norms(model, layer) + _mlp(layer),
        layer_key=key,
        layer_score=score,
        layer_input=Kept(compute=hidden),
        outside=outside,
        response_token=Kept(compute=hidden, float32=2),
        shared_score=Kept(compute=model.config.get_text_config()._attn_implementation == SPAN_ATTENTION),
    )


def _key_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _attention(model: PreTrainedModel, layer: nn.Module) -> tuple[Kept, Kept, Kept]:
    """(per position, per key, per score): q and the output, k and v, and what the kernel keeps."""
    config = model.config.get_text_config()
    heads, size = config.num_attention_heads, head_size(config)
    q_size, k_size = heads * size, _key_heads(config) * size
    if config._attn_implementation == "eager":
        softcap = heads if getattr(config, "attn_logit_softcapping", None) else 0
        return Kept(compute=2 * q_size), Kept(compute=2 * q_size), Kept(compute=heads + softcap, widened=heads)
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    view = q_size + k_size if names & {"query_key_value", "qkv_proj"} else 0
    if config._attn_implementation in SKIPS_THE_MASKED:
        return Kept(compute=2 * q_size + view, float32=heads), Kept(compute=2 * k_size), Kept()
    if config._attn_implementation == SPAN_ATTENTION:
        return Kept(compute=3 * q_size, float32=heads), Kept(compute=2 * k_size), Kept()
    return Kept(compute=2 * q_size + view, float32=heads), Kept(compute=2 * q_size), Kept(compute=1)


def _norms(model: PreTrainedModel, layer: nn.Module) -> Kept:
    """Norms, and the inputs of attention and MLP, which are outputs of a norm or the residual stream."""
    config = model.config.get_text_config()
    size, heads = head_size(config), config.num_attention_heads
    sizes = {"q_norm": heads * size, "k_norm": _key_heads(config) * size}
    kept, between = Kept(), []
    for name, module in layer.named_modules():
        if _is_norm(module):
            leaf = name.rpartition(".")[2]
            if leaf in sizes:
                kept += _norm(module, sizes[leaf])
            else:
                between.append(_norm(module, config.hidden_size))
    # Attention and MLP side by side: two norms read the same residual (GPT-NeoX), or one norm feeds both (Cohere).
    inputs = Kept(compute=config.hidden_size * min(2, len(between)))
    for norm in between[: 1 if getattr(config, "use_parallel_residual", False) else None]:
        kept += norm
    return kept + inputs


def _mlp(layer: nn.Module) -> Kept:
    linear = [
        module
        for name, module in layer.named_modules()
        if "att" not in name and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]
    width = max(linear[-1].weight.shape)
    gated = sum(module.weight.numel() for module in linear) > 2 * linear[-1].weight.numel()
    spelt_out = any(type(module).__name__ == "NewGELUActivation" for module in layer.modules())
    return Kept(compute=((4 if gated else 2) + 3 * spelt_out) * width)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _norm(module: nn.Module, size: int) -> Kept:
    if isinstance(module, nn.LayerNorm):
        return Kept(compute=size)
    in_float32 = _NORMS_IN_FLOAT32.get(type(module).__name__)
    return Kept(float32=in_float32 * size) if in_float32 else Kept(compute=size, float32=size)
