"""An adapter's folder as peft writes it: what it says of itself, its tensors, and whether they fit a model. All without peft."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.base.ranks import world_group
from mrpo_scale.base.untrusted import read_json
from mrpo_scale.models.on_disk import OnDisk
from mrpo_scale.models.source import ReferenceSource, local_folder, open_weights, resolve_source, some
from mrpo_scale.models.stored import build_on_meta
from mrpo_scale.models.weight_sample import same_model

ADAPTER_CONFIG = "adapter_config.json"  #: the file by which a folder is known to hold an adapter and not a model
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HOLDS = f"an adapter's folder holds {ADAPTER_CONFIG}, which names its base, and {ADAPTER_WEIGHTS}, as peft and `mrpo train` write"

#: What the product of a layer with its adapter depends on: keys of peft's LoraConfig, and what they are unless said.
_SETTINGS: Mapping[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "lora_bias": False,
}
#: Keys of how it was made: of training, or of choosing the layers that its tensors name.
_OF_TRAINING = frozenset(
    (
        *(
            "peft_type",
            "task_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        ),
        *(
            "lora_dropout",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "init_lora_weights",
        ),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
        *("runtime_config", "ensure_weight_tying"),
    )
)
#: Starts that leave the base's weights what they are; others, such as PiSSA's, take part of them away.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB]\.weight|B\.bias)")
#: peft takes the keys of patterns for regular expressions; one with quantifiers can take for ever.
_PATTERN = re.compile(r"[\w.^$\\]+")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of linear layers, whose tensors are still on disk.

    Args:
        settings: of its LoraConfig, all that its product depends on.
        layers: {name of a layer in the model: {"A.weight" [r, in], "B.weight" [out, r], perhaps "B.bias" [out]}}.
    """

    name: str
    path: str
    file: Path
    settings: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, OnDisk]]

    def rank(self, layer: str) -> int:
        """What the settings say of a layer."""
        patterns = self.settings["rank_pattern"]
        own = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), None)
        return self.settings["r"] if own is None else patterns[own]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for parts in self.layers.values() for tensor in parts.values())


def base_of(folder: Path) -> tuple[str, str | None]:
    """The model that an adapter's folder says it belongs to, and its revision.

    Raises:
        ConfigError: the folder holds no adapter, or one that names none.
    """
    config = _read_config(folder)
    try:
        return str(config["base_model_name_or_path"]), config.get("revision")
    except KeyError:
        raise ConfigError(f"{folder}: {ADAPTER_CONFIG} has no `base_model_name_or_path`; {_HOLDS}.") from None


def read_adapter(source: ReferenceSource) -> Adapter:
    """The adapter of a reference, whose ``adapter`` is at hand. Its config and the header of its tensors are read, nothing else is.

    Raises:
        ConfigError: there is none, it is kept as a pickle, or it is more than products beside linear layers.
    """
    assert source.adapter is not None
    folder, name = Path(source.adapter.files), source.name
    config = _read_config(folder, f"{name}: ")
    problem = _problem(config)
    if problem:
        raise ConfigError(
            f"{name}: {folder}/{ADAPTER_CONFIG} says {problem}, which an adapter that shares its base's weights cannot have; make "
            f"a whole model of it with `mrpo merge {folder} --output FOLDER`."
        )
    settings = {key: config.get(key) or default for key, default in _SETTINGS.items()}
    return Adapter(name, source.adapter.path, folder / ADAPTER_WEIGHTS, settings, _layers(folder, name))


def resolve_adapter(source: ReferenceSource, config: PretrainedConfig) -> ReferenceSource:
    """With its adapter's files on this machine, and seen to fit the base. Collective over the world.

    Args:
        config: of the base, no weights of which are read but samples, where the adapter names another folder or hub id.

    Raises:
        ConfigError: as :func:`read_adapter`; it belongs to another base; or it lies on the output head or on embeddings.
    """
    assert source.adapter is not None
    adapter = resolve_source(source.adapter)
    folder = local_folder(adapter, world_group())  # small beside a model, so that a dry run may have it too
    source = replace(source, adapter=replace(adapter, folder=folder))
    base, revision = base_of(folder)
    if not same_model(source, base, revision):
        raise ConfigError(
            f"{source.name}: the adapter {adapter.path} belongs to {base}{f' at {revision}' if revision else ''}, not to "
            f"{source.path}; name that model, or where this one is a copy of it, say so in `base_model_name_or_path` of its "
            f"{ADAPTER_CONFIG}."
        )
    _check_fit(read_adapter(source), build_on_meta(source, config), source)
    return source


def _read_config(folder: Path, whose: str = "") -> dict[str, Any]:
    try:
        config = read_json(folder / ADAPTER_CONFIG, 1 << 20)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{whose}{folder} is no adapter's folder: {ADAPTER_CONFIG}: {one_line(error)}; {_HOLDS}."
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{whose}{folder}/{ADAPTER_CONFIG} is no mapping of keys to values; {_HOLDS}.")
    return config


def _problem(config: Mapping[str, Any]) -> str | None:
    """What of a config is more than products beside linear layers. A key that nobody here knows is refused unless it is empty."""
    if config.get("peft_type") != "LORA":
        return f"`peft_type: {config.get('peft_type')}`"
    if config.get("init_lora_weights", True) not in _STARTS:
        return f"`init_lora_weights: {config['init_lora_weights']}`"
    for key, value in config.items():
        if key in _SETTINGS:
            kind = type(_SETTINGS[key])
            patterns = value if kind is dict and isinstance(value, dict) else {}
            numbers = [value] if kind is int else list(patterns.values())
            if value is not None and not isinstance(value, (int, float) if key == "lora_alpha" else kind):
                return f"`{key}: {value}`"
            if any(
                isinstance(n, bool) or not isinstance(n, int | float) or not n > 0 for n in numbers if n is not None
            ):
                return f"`{key}: {value}`"
            if odd := [pattern for pattern in patterns if not _PATTERN.fullmatch(pattern)]:
                return f"`{key}` with the pattern `{odd[0]}`"
        elif key not in _OF_TRAINING and value and (key, value) != ("bias", "none"):
            return f"`{key}: {value}`"
    return None


def _layers(folder: Path, name: str) -> dict[str, dict[str, OnDisk]]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        others = sorted(path.name for path in folder.glob("adapter_model.*"))
        found = f" (found {some(others)}, and pickles are not read)" if others else ""
        raise ConfigError(f"{name}: no {ADAPTER_WEIGHTS} in {folder}{found}; {_HOLDS}.")
    layers: dict[str, dict[str, OnDisk]] = {}
    with open_weights(file, name) as tensors:
        for key in tensors.keys():  # noqa: SIM118 (no mapping)
            match = _TENSOR.fullmatch(key)
            if match is None:
                raise ConfigError(
                    f"{name}: {file} holds {key}, which is no LoRA of a linear layer; make a whole model of it with `mrpo merge "
                    f"{folder} --output FOLDER`."
                )
            layers.setdefault(match["layer"], {})[match["part"]] = OnDisk(file, key, tensors.get_slice(key))
    if not layers:
        raise ConfigError(f"{name}: {file} holds no tensors; {_HOLDS}.")
    return layers


def _check_fit(adapter: Adapter, model: PreTrainedModel, source: ReferenceSource) -> None:
    """Raises ConfigError where a tensor is not of a linear layer of ``model``, on meta, or is of its head."""
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    whose = f"{source.name}: the adapter {adapter.path}"
    for layer, parts in adapter.layers.items():
        module = modules.get(layer)
        if module is None:
            raise ConfigError(
                f"{whose} is not one of {source.path}, which has no layer {layer}; name the adapter's own base."
            )
        if module is head or not isinstance(module, nn.Linear | Conv1D):
            what = (
                "the output head, which scores pairs in a kernel of its own"
                if module is head
                else type(module).__name__
            )
            raise ConfigError(
                f"{whose} lies on {layer}, {what}; make a whole model of it with `mrpo merge {adapter.path} --output FOLDER`."
            )
        rows, columns = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
        rank = adapter.rank(layer)
        wanted = {"A.weight": [rank, columns], "B.weight": [rows, rank]}
        wanted |= {"B.bias": [rows]} if adapter.settings["lora_bias"] else {}
        found = {part: tensor.shape for part, tensor in parts.items()}
        if found != wanted:
            raise ConfigError(
                f"{whose} does not fit {source.path}: of {layer} it has {found}, where that model and its {ADAPTER_CONFIG} ask for "
                f"{wanted}; name the adapter's own base."
            )
