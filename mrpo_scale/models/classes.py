"""Which of transformers' classes a model is built as: of a type that sees pictures too, its class for those; else its causal class.

The former is a language model as it is, once its towers are left out: the submodels that have no part in a forward of text. They
are neither built nor read, and the tensors of theirs in a policy's folder are kept as they are (left_out.py).
"""

from __future__ import annotations

import functools
import re
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from mrpo_scale.models.source import ReferenceSource, named_text_class


def class_of(source: ReferenceSource, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a model is built as whose config ``check_config`` has let through."""
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own_code and source.trust_remote_code:
        return get_class_from_dynamic_module(own_code, source.files, revision=source.revision)
    return class_beside_auto(config) or cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def class_beside_auto(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of what ``AutoModelForCausalLM`` does not build, or builds as something else: of a type that
    ``AutoModelForImageTextToText`` builds, its class without the towers; of a text model that has no type of its own there, the
    class that its config names. None: what ``AutoModelForCausalLM`` builds."""
    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return _without_towers(cast(Any, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]))
    return None if kind in MODEL_FOR_CAUSAL_LM_MAPPING else named_text_class(config)


@functools.cache
def _without_towers(wrapper: Any) -> type[PreTrainedModel]:
    """A subclass, so that ``from_pretrained`` itself reads what is left and no more. It goes by its parent's name, by which
    transformers finds tables of renamed tensors and servers the architecture."""

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        wrapper.__init__(self, *args, **kwargs)
        left_out = _leave_out_towers(self)
        patterns = [rf"(^|\.){re.escape(name)}\." for name in sorted(left_out)]
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *patterns}

    names = {"__init__": build, "__module__": wrapper.__module__, "__qualname__": wrapper.__qualname__}
    return cast(type[PreTrainedModel], type(wrapper.__name__, (wrapper,), names))


def _leave_out_towers(model: PreTrainedModel) -> set[str]:
    """Put None where a submodel was that does not hold the embedding of tokens, and return the attributes' names. A projector
    is no submodel and stays: it is small, and a model may call it for every text."""
    embedding = model.get_input_embeddings()
    left_out: set[str] = set()

    def visit(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if any(inner is embedding for inner in child.modules()):
                visit(child)
            elif isinstance(child, PreTrainedModel):
                setattr(module, name, None)
                left_out.add(name)

    visit(model)
    return left_out
