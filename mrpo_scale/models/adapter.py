"""The policy as frozen weights with a LoRA adapter (peft): made, checked before weights load, and switched off for the anchor."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.config.adapter_keys import AdapterKeys
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.models.stored import build_on_meta

logger = logging.getLogger(__name__)


def has_adapter(model: nn.Module) -> bool:
    """Whether ``model`` is one of :func:`add_adapter`."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def needs_peft() -> None:
    """Raises ConfigError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "adapters (`use_peft`, `ref_models.adapter`, `mrpo merge`) need the package peft; `pip install 'mrpo-scale[peft]'`."
        )


def _check_quantization(args: MRPOConfig) -> None:
    if not args.load_in_4bit:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("`load_in_4bit: true` needs the package bitsandbytes; `pip install 'mrpo-scale[peft]'`.")
    if not args.anchor and not args.anchor_is_policy:
        asks = (
            "`ref_weights: validation`"
            if args.weights_from_validation
            else "`ref_cache_dir` or `ref_scoring: precompute`"
        )
        raise ConfigError(
            f"`load_in_4bit: true` with {asks}: those scores are made of unquantized weights, from which the "
            "policy does not start; score live, or name the unquantized model as `anchor`."
        )


def check_adapter(source: ReferenceSource, config: PretrainedConfig, args: MRPOConfig) -> None:
    """Put the adapter of ``args`` on the model without its weights. Costs a second; nothing is read.

    Raises:
        ConfigError: peft is missing; no layer has such a name; or the adapter would lie on the output head, whose product with the
            hidden states is never formed as a layer's output (kernels/).
    """
    needs_peft()
    _check_quantization(args)
    model = build_on_meta(source, config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = wrapped(model, args)
    named = _asked(args)
    # peft replaces what it adapts, so these are the same modules only where it left them alone.
    if adapted.get_output_embeddings() is not head:
        raise ConfigError(
            f"{named} puts an adapter on the output head, which scores pairs in a kernel of its own; leave the head out "
            "(all-linear does)."
        )
    if config.get_text_config().tie_word_embeddings and adapted.get_input_embeddings() is not embedding:
        raise ConfigError(
            f"{named} puts an adapter on the input embeddings, which are the output head of this model too; leave them out."
        )


def four_bits(args: MRPOConfig) -> BitsAndBytesConfig | None:
    """How the policy's frozen weights are quantized as they load; None: not at all. The output head never is."""
    if not args.load_in_4bit:
        return None
    computed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else args.policy_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=args.bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=computed,
    )


def add_adapter(policy: PreTrainedModel, source: ReferenceSource, args: MRPOConfig) -> PreTrainedModel:
    """The policy with a fresh adapter, which changes nothing yet, its own weights frozen. The same on every rank and in every
    resumption: drawn from ``seed``.

    Args:
        source: of the policy; the adapter's folder names it as its base.

    Returns:
        a peft model, which passes on whatever else is asked of the policy.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(args.seed)
        # DeepSpeed keeps float32 copies of what trains; without it 16 bits would lose updates, and Adam's epsilon is 0 in float16.
        adapted = wrapped(policy, args, float32=args.deepspeed_plugin is None)
    adapted.active_peft_config.base_model_name_or_path = (
        source.path
    )  # as the user wrote it: a hub id, and not where it lies here
    adapted.active_peft_config.revision = source.revision
    modules: Iterable[Any] = policy.modules()
    for module in modules:
        # On CPUs with AVX512-BF16 bitsandbytes packs weights at the first forward in eval mode for products that have no backward:
        # no gradient would reach what lies before such a layer, without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    counts = count_parameters(adapted)
    logger.info(
        "LoRA: %s of the policy's %s weights train (%.2f%%)",
        f"{counts[1]:,}",
        f"{sum(counts):,}",
        100 * counts[1] / sum(counts),
    )
    return adapted


def merge(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with the weights of an adapter's folder added to its own, in float32 whatever their dtype, so that they round once.

    Raises:
        ConfigError: the adapter is not one of this model's, or cannot be added to its weights.
    """
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(base.float(), str(folder), autocast_adapter_dtype=True)
        return adapted.merge_and_unload(progressbar=False, safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{folder}: its adapter does not go into that model: {one_line(error)[:300]}.") from error


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many weights of a model are frozen, and how many train; under ZeRO-3 whole, not this rank's share, and not packed bytes
    where they are quantized."""
    if has_adapter(model):
        trained, total = cast(Any, model).get_nb_trainable_parameters()
        return total - trained, trained
    counts = [0, 0]
    for parameter in model.parameters():
        counts[parameter.requires_grad] += int(getattr(parameter, "ds_numel", parameter.numel()))
    return counts[0], counts[1]


def wrapped(model: PreTrainedModel, args: AdapterKeys, *, float32: bool = False) -> Any:
    """The peft model of these keys, around ``model``, which may be on the meta device. Raises ConfigError as check_adapter."""
    from peft import LoraConfig, get_peft_model

    targets: Any = args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        target_parameters=args.lora_target_parameters,
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=float32)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"{_asked(args)}: {one_line(error).rstrip('.')}; name layers of this model, or all-linear."
        ) from error


def _asked(args: AdapterKeys) -> str:
    """The keys that say where the adapter lies, in words."""
    keys = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save")
    return ", ".join(f"`{key}: {getattr(args, key)}`" for key in keys if getattr(args, key)) or "`use_peft: true`"
