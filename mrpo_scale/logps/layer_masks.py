"""What a model's layers are, as far as sharing a prompt asks: whether attention alone mixes positions, and which masks it takes.

transformers makes a model's masks by the kind of its layers (``LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING`` in its masking utilities):
a dict by kind where the config has ``layer_types``, else one mask. Three kinds are attention over positions: all that is before, a
window, a chunk. With masks of these kinds, made over pairs, and position ids that restart after the prompt, such a model cannot
tell a shared prompt from a text of its own. Layers that carry a state along the row (recurrent, convolutional, hybrid) can, and
the attention of an indexer chooses its keys by what it has seen.

What is decided here is proven for the model at hand by the check at start (:mod:`~mrpo_scale.logps.self_check`), and for every
causal type of the installed transformers by tests/logps/test_causal_types.py.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.logps.attention_ways import WAYS
from mrpo_scale.logps.span_attention import SPAN_ATTENTION

#: Kinds of layers whose masks can be made over pairs.
KINDS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class LayerMasks:
    """The masks that a model's forward takes."""

    kinds: tuple[str, ...]
    by_name: bool  #: a dict of a mask for each kind; False: one mask, of the only kind


def body_of(model: PreTrainedModel) -> nn.Module:
    """The module of a causal LM that makes hidden states of tokens, everything but the head.

    Raises:
        ConfigError: it cannot be told which of the model's modules that is.
    """
    if model.base_model is not model:
        return model.base_model
    # A class may name a prefix that it does not have (Llama 4's text model): then its only part that is a model.
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(parts)} parts that could be its body, not one, so its log-probs cannot be computed "
            "here; choose another model."
        )
    # One that has the head too is a causal LM inside another model (Llama 4's in the one that sees pictures).
    head = model.get_output_embeddings()
    return body_of(parts[0]) if any(module is head for module in parts[0].modules()) else parts[0]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that gradient checkpointing recomputes and FSDP gathers, one by one: those that the model's class names, or else
    (Marian, OpenAI GPT, ...) the members of its largest list of modules. None where it has neither."""
    classes = set(model._no_split_modules or ())
    named = [module for module in model.modules() if type(module).__name__ in classes]
    if named:
        return named
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [members for members in lists if not any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for m in members)]
    return max(blocks, key=parameters_of, default=[])


def parameters_of(modules: Sequence[nn.Module]) -> int:
    """Of ZeRO-3's parameters, which are empty where they lie, too."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for module in modules for p in module.parameters())


def layer_masks(model: PreTrainedModel) -> LayerMasks:
    """As transformers' ``create_masks_for_generate`` decides it, of the config; a window or chunk that stands there counts only
    where the model's own code makes such masks (Moshi's does not)."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return LayerMasks(tuple(sorted(set(layer_types))), by_name=True)
    if getattr(config, "sliding_window", None) is not None and _code_has(model, "create_sliding_window_causal_mask"):
        return LayerMasks(("sliding_attention",), by_name=False)
    if getattr(config, "attention_chunk_size", None) is not None and _code_has(model, "create_chunked_causal_mask"):
        return LayerMasks(("chunked_attention",), by_name=False)
    return LayerMasks(("full_attention",), by_name=False)


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why chosen and rejected cannot share one forward over their prompt, under whatever attention; None: they can."""
    body = body_of(model)
    others = sorted(set(layer_masks(model).kinds) - set(KINDS))
    if others:
        return f"its layers are {', '.join(others)}"
    parts = [module for layer in decoder_layers(model) for module in layer.modules()]
    if model._is_stateful or any(isinstance(module, nn.Conv1d) for module in parts):
        return "a state or a convolution goes along the row"
    if not model._supports_attention_backend:
        return "its attention is its own, not transformers' interface"
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return "it does not take the positions of its tokens"
    return None


def supports_shared_prompt(model: PreTrainedModel) -> bool:
    """Whether chosen and rejected can share one forward over their prompt, under the attention that it has."""
    told = model.config._attn_implementation in ("sdpa", "eager", SPAN_ATTENTION, *WAYS)
    return told and why_not_shared(model) is None


def reaches_attention(model: PreTrainedModel) -> bool:
    """Whether an attention function of ours is called and told where pairs lie end to end: nothing but attention mixes positions,
    what the forward is given beside its own arguments goes down to it, and no layer has chunks, which such a call has not."""
    if why_not_shared(model) is not None or "chunked_attention" in layer_masks(model).kinds:
        return False
    attention = {type(m).forward for m in body_of(model).modules() if type(m).__name__.endswith("Attention")}
    layers = {type(layer).forward for layer in decoder_layers(model)}
    looked_up = any("ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(forward).__code__.co_names for forward in attention)
    return looked_up and all(map(_hands_on, [type(body_of(model)).forward, *layers, *attention]))


def _hands_on(forward: Callable[..., Any]) -> bool:
    """Whether a forward takes any keyword and its code passes them on: Nemotron's layers take them and drop them."""
    forward = inspect.unwrap(forward)
    names = [name for name, p in inspect.signature(forward).parameters.items() if p.kind is p.VAR_KEYWORD]
    return bool(names) and inspect.getsource(forward).count(f"**{names[0]}") > 1


def _code_has(model: PreTrainedModel, name: str) -> bool:
    """Whether the module that defines the model of text knows ``name`` of transformers: the innermost one around the embedding of
    tokens, which need not be of the wrapper's own family (Idefics 2 wraps Mistral's)."""
    body, embedding = body_of(model), model.get_input_embeddings()
    around = [
        part
        for part in body.modules()
        if isinstance(part, PreTrainedModel) and any(inner is embedding for inner in part.modules())
    ]
    return hasattr(sys.modules[type([body, *around][-1]).__module__], name)


def first_position(model: PreTrainedModel) -> int:
    """The number of a text's first position: 0; where positions are counted as fairseq does (Kosmos 2.5), one more than the padding
    token's id."""
    for module in body_of(model).modules():
        padding = getattr(module, "padding_idx", None)
        if hasattr(module, "create_position_ids_from_input_ids") and isinstance(padding, int):
            return padding + 1 if "position_ids" in inspect.signature(module.forward).parameters else 0
    return 0
