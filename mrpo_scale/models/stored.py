"""The tensors of a checkpoint by the names that a model in memory has for them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.big_modeling import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations import deepspeed as hf_deepspeed

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.models.classes import wrapper_class
from mrpo_scale.models.on_disk import Converted, OnDisk, Stored, targets_of
from mrpo_scale.models.quantized import OF_ACTIVATIONS, dequantizer, quantization_of
from mrpo_scale.models.source import ReferenceSource, open_weights, some

# Buffers that old checkpoints hold and that today's models compute; `PreTrainedModel` ignores the same two for every model.
COMPUTED_BUFFERS = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]


def stored_tensors(model: PreTrainedModel, files: list[Path], name: str) -> dict[str, Stored]:
    """{name in the model: what it is made of on disk}. Checkpoints keep the names and layouts of their first days (GPT-NeoX:
    embed_out for lm_head; mixtures: a matrix for each expert), which transformers' own table and rules translate.

    Of a model that has not been sharded yet: the table goes by the names of classes, which FSDP2 changes.
    """
    quantizer = dequantizer(model.config, name)
    transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    on_disk: dict[str, OnDisk] = {}
    for file in files:
        with open_weights(file, name) as tensors:
            on_disk.update({key: OnDisk(file, key, tensors.get_slice(key)) for key in tensors.keys()})  # noqa: SIM118
    stored: dict[str, Stored] = {}
    for key in sorted(on_disk, key=dot_natural_key):  # experts by number, as converters want them
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = key, None
        if pattern is None:
            stored[target] = on_disk[key]
            continue
        for made in targets_of(converter_of[pattern], target):
            if made not in stored:
                stored[made] = Converted(name, model, converter_of[pattern], target, made)
            cast(Converted, stored[made]).sources[pattern].append(on_disk[key])
    return stored


def match_names(model: PreTrainedModel, stored: Mapping[str, Stored], name: str) -> dict[str, list[str]]:
    """{a name that is on disk: all names that the model has for that tensor}, several if tied.

    Raises:
        ConfigError: a tensor is missing, or unknown to the model; or tied tensors differ on disk.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    for tensor_name, tensor in model.state_dict(keep_vars=True).items():
        names_of[id(tensor)].append(tensor_name)
    plan: dict[str, list[str]] = {}
    missing: list[str] = []
    for names in names_of.values():
        present = [n for n in names if n in stored]
        if not present:
            missing.append(names[0])
            continue
        plan[present[0]] = names
        for other in present[1:]:
            if not torch.equal(stored[present[0]].read(), stored[other].read()):
                raise ConfigError(
                    f"{name}: its config ties {present[0]} to {other}, but the checkpoint holds two different tensors; say "
                    "`tie_word_embeddings: false` in its config.json if they are meant to differ."
                )
    known = {n for names in names_of.values() for n in names}
    ignored = [*COMPUTED_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or [])]
    ignorable = re.compile("|".join(ignored + OF_ACTIVATIONS * (quantization_of(model.config) is not None)))
    unknown = sorted(n for n in stored if n not in known and not ignorable.search(n))
    if missing or unknown:
        problems = [f"misses {some(missing)}"] * bool(missing) + [f"has unknown {some(unknown)}"] * bool(unknown)
        # Written again by transformers, a folder that lacks a tensor has a random one and looks whole.
        remedy = (
            "Get the model again, or name the language model that it was made from."
            if missing
            else "A head or adapter of another task must go first: load it as a "
            f"{type(model).__name__} and write it again with `save_pretrained`."
        )
        raise ConfigError(
            f"{name}: the checkpoint {' and '.join(problems)}, so it is not a whole {type(model).__name__}. {remedy}"
        )
    return plan


@contextmanager
def zero3_unset() -> Iterator[None]:
    """Hide transformers' ZeRO-3 config object: alive, it partitions every model that is built over the whole world."""
    weak = hf_deepspeed._hf_deepspeed_config_weak_ref
    alive = None if weak is None else weak()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if alive is not None:
            hf_deepspeed.set_hf_deepspeed_config(alive)


def build_on_meta(
    source: ReferenceSource, config: PretrainedConfig, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model with its parameters on meta and its buffers real, frozen and in eval mode.

    Args:
        auto: transformers' class that knows how models of this task are built.
    """
    options: dict[str, Any] = {"dtype": source.dtype}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    # Not `to_empty` after a build on meta: it leaves the rotary buffers garbage, and nothing complains.
    try:
        with zero3_unset(), init_empty_weights(include_buffers=False):
            wrapper = wrapper_class(config) if auto is AutoModelForCausalLM else None
            if wrapper is None:
                model = auto.from_config(config, trust_remote_code=source.trust_remote_code, **options)
            else:
                model = wrapper._from_config(config, **options)
    except (ImportError, ValueError) as error:  # an attention that is not installed, or that the model does not have
        raise ConfigError(
            f"{source.name}: {source.path} cannot be built here ({one_line(error)}); see `attn_implementation`."
        ) from error
    model.tie_weights()  # the move to meta has parted what the constructor tied
    _keep_float32(model, source.dtype)
    return model.requires_grad_(False).eval()


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters on meta, and the buffers, the dtypes that ``from_pretrained(dtype=dtype)`` gives them: some models keep
    some of theirs in float32 (``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``), a router's bias for instance."""
    plan = model._get_dtype_plan(dtype)
    kept, pattern_of, _ = build_glob_alternation(list(plan))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        match = kept.search(name) if plan else None
        if match is not None:
            tensor.data = tensor.data.to(plan[pattern_of[str(match.lastgroup)]])


def locate_tensors(
    model: PreTrainedModel, files: list[Path], name: str
) -> tuple[dict[str, Stored], dict[str, list[str]]]:
    """(:func:`stored_tensors`, :func:`match_names`) of files that hold the whole model.

    Raises:
        ConfigError: they do not: see :func:`match_names`; or a tensor has another shape.
    """
    stored = stored_tensors(model, files, name)
    plan = match_names(model, stored, name)
    state = model.state_dict()
    for target in plan:
        shape, found = list(state[target].shape), stored[target].shape
        if found != shape:
            raise ConfigError(
                f"{name}: {target} is {found} in the checkpoint but {shape} by its config.json; the two do not belong together."
            )
    return stored, plan
