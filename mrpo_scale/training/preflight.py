"""What a run needs beyond its keys' values: packages, held-out pairs, a metric of that name. Decided in one place, before anything
loads, for training and for `mrpo check` alike; both say all of it at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers import Trainer
from transformers.integrations import integration_utils as reporting
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import get_scheduler
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_kernels_available

from mrpo_scale.base.errors import ConfigError, one_line, refuse
from mrpo_scale.config.ds_config import read_ds_config
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.model_spec import LIVE_SERVED, ModelSpec, parse_ref_models, server_key
from mrpo_scale.logps.attention_ways import WAYS
from mrpo_scale.models.adapter import needs_peft
from mrpo_scale.references.low_bits import check_low_bits
from mrpo_scale.training.metrics import metric_names

RefModels = Sequence[str | Mapping[str, Any]]
#: Attention of packages: the module that has it.
_FLASH = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
    **{way.name: way.package for way in WAYS.values() if way.package is not None},
}
#: Packages of trackers, where they have another name.
_TRACKERS = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
#: Optimizers that transformers makes of a model's weights: of them only the packages are looked for here.
_OF_WEIGHTS = ("galore", "apollo", "lomo", "adalomo")
_MEASURED_BY_TRAINER = ("loss", "runtime", "samples_per_second", "steps_per_second")


def preflight(
    config: MRPOConfig, ref_models: RefModels = (), *, trains: bool = True, own_optimizer: bool = False
) -> None:
    """Refuse what this run could not do, whatever its data and weights are.

    Args:
        trains: False: references alone are loaded, nothing is optimized or logged.
        own_optimizer: Python has brought an optimizer, so that of the keys is not made.

    Raises:
        ConfigError: a package that a key needs is not here, or a value that only its user knows to be wrong; all of them.
    """
    refuse(preflight_problems(config, ref_models, trains=trains, own_optimizer=own_optimizer))


def preflight_problems(
    config: MRPOConfig, ref_models: RefModels, *, trains: bool = True, own_optimizer: bool = False
) -> list[str]:
    """What :func:`preflight` refuses, one sentence each."""
    problems = [
        *_attention(config, ref_models),
        *_served(config, ref_models, trains),
        *_quantized(config, ref_models, trains),
        *_adapters(config, ref_models, trains),
    ]
    if trains:
        problems += [*_reporting(config), *_compilation(config), *_zero(config)]
    if trains and not own_optimizer:
        problems += [*_optimizer(config), *_scheduler(config)]
    return problems


def check_evaluation(config: MRPOConfig, held_out: Any) -> None:
    """Refuse to evaluate on nothing. ``held_out``: rows, a mapping of names to rows, or None.

    Raises:
        ConfigError: a key asks for an evaluation and there are no held-out pairs.
    """
    if held_out is not None and held_out != {}:
        return
    asks = [f"`eval_strategy: {IntervalStrategy(config.eval_strategy).value}`"] if config.eval_strategy != "no" else []
    asks += [f"`{key}: True`" for key in ("eval_on_start", "load_best_model_at_end") if getattr(config, key)]
    if config.save_strategy == "best":
        asks.append("`save_strategy: best`")
    if asks:
        keys = " and ".join(asks)
        raise ConfigError(
            f"{keys}: there are no held-out pairs to evaluate on; name a split of the data with `dataset_test_split`, set "
            "`held_out`, pass `eval_dataset`, or remove the key."
        )


def check_best_metric(config: MRPOConfig, names: Sequence[str], sets: Collection[str]) -> None:
    """Refuse a ``metric_for_best_model`` that no evaluation measures.

    Args:
        names: the references', as in the metrics.
        sets: names of the held-out sets where several were given by name.

    Raises:
        ConfigError: it is none of this run's metrics.
    """
    wanted = config.metric_for_best_model
    if not wanted or config.eval_strategy == "no":
        return
    measured = [*_MEASURED_BY_TRAINER, *metric_names(config.build_objective(), names)]
    known = [f"{name}_{metric}" for name in sets for metric in measured] if sets else measured
    if wanted.removeprefix("eval_") not in known:
        raise ConfigError(f"`metric_for_best_model: {wanted}` is not measured; choose one of {', '.join(known)}.")


def _reporting(config: MRPOConfig) -> Iterator[str]:
    here = set(reporting.get_available_reporting_integrations())
    # Two that transformers can use and does not list.
    here |= {"azure_ml"} if reporting.is_azureml_available() else set()
    here |= {"flyte"} if reporting.is_flytekit_available() else set()
    known = reporting.INTEGRATION_TO_CALLBACK
    for name in config.report_to or ():
        if name not in known:
            yield f"`report_to: {name}` is not known; choose among {', '.join(known)}, none"
        elif name not in here:
            package = _TRACKERS.get(name, name)
            yield (
                f"`report_to: {name}` needs {package}, which is not installed or not set up here; `pip install {package}`, or set "
                "`report_to: none`"
            )


def _optimizer(config: MRPOConfig) -> Iterator[str]:
    if "optimizer" in _ds_config(config):
        return
    name = str(OptimizerNames(config.optim).value)
    made_of_weights = name.startswith(_OF_WEIGHTS)
    if name.startswith(("galore", "apollo")) and config.optim_target_modules is None:
        yield f"`optim: {name}` needs `optim_target_modules`, such as all-linear"
    try:
        Trainer.get_optimizer_cls_and_kwargs(config, nn.Module() if made_of_weights else None)  # type: ignore[arg-type]
    except (ImportError, RuntimeError, ValueError) as error:
        if isinstance(error, ImportError) or not made_of_weights:
            options = f" with `optim_args: {config.optim_args}`" if config.optim_args else ""
            yield f"`optim: {name}`{options}: {one_line(error)}"


def _ds_config(config: MRPOConfig) -> dict[str, Any]:
    """The recipe's DeepSpeed configuration, or the launcher's; empty where there is none."""
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is not None:
        return plugin.deepspeed_config
    return read_ds_config(config.deepspeed) if config.deepspeed else {}


def _zero(config: MRPOConfig) -> Iterator[str]:
    if _ds_config(config).get("sequence_parallel_size"):
        yield (
            "`sequence_parallel_size` of the DeepSpeed config belongs to a way that replaces the attention of the references, too; "
            "remove it there and set the recipe's key of that name"
        )
    given = _ds_config(config).get("zero_optimization")
    if given:
        from deepspeed.runtime.zero.config import (
            DeepSpeedZeroConfig,  # seconds, and another op to build, where it is not used
        )

        try:
            DeepSpeedZeroConfig(**{key: value for key, value in given.items() if value != "auto"})
        except (TypeError, ValueError, AssertionError) as error:
            yield f"`zero_optimization` of the DeepSpeed config: {one_line(error)}"


def _scheduler(config: MRPOConfig) -> Iterator[str]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
        )
    except (TypeError, ValueError) as error:
        yield (
            f"`lr_scheduler_type: {SchedulerType(config.lr_scheduler_type).value}` with `lr_scheduler_kwargs: "
            f"{config.lr_scheduler_kwargs}`: {one_line(error)}"
        )


def _compilation(config: MRPOConfig) -> Iterator[str]:
    if not config.torch_compile:
        return
    try:
        TorchDynamoPlugin(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    except ValueError as error:
        yield f"`torch_compile_backend: {config.torch_compile_backend}`: {one_line(error)}; choose inductor or eager"
    if config.torch_compile_backend == "inductor" and config.torch_compile_mode is not None:
        known = torch._inductor.list_mode_options()
        if config.torch_compile_mode not in known:
            yield f"`torch_compile_mode: {config.torch_compile_mode}` is not known; choose one of {', '.join(known)}"


def _specs(config: MRPOConfig, ref_models: RefModels) -> list[ModelSpec]:
    return [*parse_ref_models(ref_models), *parse_ref_models([config.anchor] if config.anchor else [], "anchor")]


def _served(config: MRPOConfig, ref_models: RefModels, trains: bool) -> Iterator[str]:
    for spec in _specs(config, ref_models):
        if spec.url and trains and config.ref_scoring == "live":
            yield LIVE_SERVED.format(spec.name or spec.model)
        elif spec.url and not (trains and config.ref_scoring == "follow"):
            try:
                server_key(spec.url, spec.api_key_env)
            except ConfigError as error:
                yield str(error)


def _quantized(config: MRPOConfig, ref_models: RefModels, trains: bool) -> Iterator[str]:
    if trains and config.ref_scoring == "follow":
        return  # another job loads them
    node = int(os.environ.get("LOCAL_WORLD_SIZE", config.world_size))
    group = min(config.ref_shard_size or node, config.world_size)
    for spec in _specs(config, ref_models):
        if spec.quantize is not None:
            try:
                check_low_bits(spec.quantize, spec.name or spec.model, group_size=group, offload=config.ref_offload)
            except ConfigError as error:
                yield str(error)


def _adapters(config: MRPOConfig, ref_models: RefModels, trains: bool) -> Iterator[str]:
    if (trains and config.ref_scoring == "follow") or not any(spec.adapter for spec in _specs(config, ref_models)):
        return
    try:
        needs_peft()
    except ConfigError as error:
        yield str(error)


def _attention(config: MRPOConfig, ref_models: RefModels) -> Iterator[str]:
    asked = {config.attn_implementation: "attn_implementation"}
    for spec in _specs(config, ref_models):
        asked.setdefault(spec.attn_implementation, "ref_models.attn_implementation")
    for name, key in asked.items():
        problem = _attention_problem(name) if name else ""
        if problem:
            yield f"`{key}: {name}` {problem}; use sdpa, or leave the key out"


def _attention_problem(name: str) -> str:
    if "/" in name:
        return "" if is_kernels_available() else "is code from the hub, which needs the package `kernels`"
    if name in _FLASH:
        here = importlib.util.find_spec(_FLASH[name]) is not None or is_kernels_available()
        return "" if here else f"needs the package `{_FLASH[name]}`, which is not installed"
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    return "" if name in known else f"is not known (transformers has {', '.join(known)})"
