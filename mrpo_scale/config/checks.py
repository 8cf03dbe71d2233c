"""What is wrong with the values of keys alone, whatever the machine. What the machine lacks is found in hardware.py, what the run
itself cannot do in training/preflight.py."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from mrpo_scale.base.errors import ConfigError, unknown_value
from mrpo_scale.config.fields import AtLeast, OneOf, marks_of


def value_mistakes(config: Any) -> Iterator[str]:
    """Values of a dataclass of keys that its types and marks do not allow, each with its remedy."""
    marks = marks_of(type(config))
    for key, hint in get_type_hints(type(config)).items():
        value = getattr(config, key, None)
        words = get_args(hint) if get_origin(hint) is Literal else ()
        for mark in marks.get(key, ()):
            if isinstance(mark, OneOf):
                words = mark.words
            if isinstance(mark, AtLeast) and value is not None and value < mark.least:
                yield f"`{key}: {value}` must be at least {mark.least:g}"
        if words and value not in words:
            yield unknown_value(key, value, words)


def training_mistakes(args: TrainingArguments) -> Iterator[str]:
    """Values of transformers' own keys that contradict each other or have no meaning."""
    if args.bf16 and args.fp16:
        yield "`bf16: True` and `fp16: True` exclude each other; remove one"
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "best" and not args.metric_for_best_model:
        yield "`save_strategy: best` needs `metric_for_best_model`, such as rewards/accuracies or loss"
    for key in ("seed", "data_seed"):
        value = getattr(args, key)
        if value is not None and not 0 <= value < 1 << 32:
            yield f"`{key}: {value}` must be from 0 to {(1 << 32) - 1}"
    if not math.isfinite(args.learning_rate) or args.learning_rate < 0:
        yield f"`learning_rate: {args.learning_rate}` must be 0 or more"


def long_context_mistakes(config: Any) -> Iterator[str]:
    """Keys that what is done for long contexts does not go with."""
    if config.activation_offloading and not config.gradient_checkpointing:
        yield (
            "`activation_offloading: true` needs `gradient_checkpointing: true`: of a layer only its input is worth the way to "
            "host memory"
        )
    size = config.sequence_parallel_size
    if size <= 1:
        return
    remedies: dict[str, tuple[Any, str]] = {
        "head_backward": (
            config.head_backward == "in_forward",
            "no rank has a whole response in its forward; set auto",
        ),
        "objective": (config.samples, "responses are sampled without it; choose mrpo, dpo or multi_dpo"),
        "torch_compile": (config.torch_compile, "what is compiled has no attention over spans; remove it"),
        "neftune_noise_alpha": (
            config.neftune_noise_alpha,
            "its noise is scaled by the length of a row, of which a rank has a part; remove it",
        ),
    }
    for key, (given, remedy) in remedies.items():
        if given:
            yield f"`{key}: {getattr(config, key)}` with `sequence_parallel_size: {size}`: {remedy}"


def loader_mistakes(args: TrainingArguments) -> Iterator[str]:
    """Keys of accelerate's that would hand the pairs of a window to other ranks than they were dealt to."""
    for key in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, key, None):
            yield (
                f"`accelerator_config: {{{key}: true}}` is not supported: the pairs of a step are dealt over the ranks by length; "
                "remove it"
            )


def unsupported(args: TrainingArguments) -> Iterator[str]:
    """Keys of transformers' that are set and have no meaning here, each with what to do instead."""
    whole = (
        "the weights would be rounded for good before they are saved; pairs are measured in the precision of training"
    )
    sampling = getattr(args, "train_sampling_strategy", "random")
    remedies: dict[str, tuple[Any, str]] = {
        "auto_find_batch_size": (args.auto_find_batch_size, "set `per_device_train_batch_size`"),
        "fsdp": (args.fsdp, "the policy is sharded by DeepSpeed ZeRO-3; use launch/accelerate/eight_gpu_zero3.yaml"),
        "label_smoothing_factor": (args.label_smoothing_factor, "use `label_smoothing`"),
        "batch_eval_metrics": (args.batch_eval_metrics, "`compute_metrics` gets the whole set at once"),
        "include_for_metrics": (
            args.include_for_metrics,
            "`compute_metrics` gets the log-probs of policy and references",
        ),
        "ignore_data_skip": (args.ignore_data_skip, "a run that goes on would train rows twice"),
        "train_sampling_strategy": (
            sampling not in ("random", "sequential"),
            "use random or sequential; pairs of a step are grouped by length already",
        ),
        "use_liger_kernel": (
            args.use_liger_kernel,
            "Liger replaces the forward that scores pairs; the fused head here does its work already, remove the key",
        ),
        "parallelism_config": (
            getattr(args, "parallelism_config", None),
            "it would replace the attention of the references, too; use `sequence_parallel_size`",
        ),
        "bf16_full_eval": (args.bf16_full_eval, whole),
        "fp16_full_eval": (args.fp16_full_eval, whole),
    }
    for key, (given, remedy) in remedies.items():
        if given:
            yield f"`{key}: {getattr(args, key)}` is not supported: {remedy}"


def iso_date(value: str) -> str:
    """``template_date`` as typed, checked. Raises ConfigError."""
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
        raise ConfigError(f"`template_date: {value}` is no date; write it as 2026-11-26.") from None


def check_world_size(world_size: int) -> None:
    """A launcher that started N processes must have got a world of N: otherwise each one silently trains alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise ConfigError(
            f"the launcher started WORLD_SIZE={launched} processes but this process sees a world of {world_size}: each would train "
            "alone. On CPU set `ddp_backend: gloo`; check `num_processes` and `distributed_type` of the accelerate config."
        )
