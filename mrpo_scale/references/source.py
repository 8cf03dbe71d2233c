"""Where a model comes from, and whatever can be known of it before its weights load."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mrpo_scale.errors import ConfigError
from mrpo_scale.ranks import fail_together

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ReferenceSource:
    """Where a reference comes from. ``path`` is a local folder, or a hub id with an optional ``revision``."""

    name: str
    path: str
    revision: str | None = None
    dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False
    attn_implementation: str | None = None


def check_source(source: ReferenceSource) -> PretrainedConfig:
    """Whatever can be known of a model before its weights load. Runs no code of the model's unless the user agreed.

    The weight files of a hub id that still has to be downloaded are checked by :class:`ShardedReference`.

    Raises:
        ConfigError: see :func:`check_config` and :func:`check_weight_files`.
    """
    config = check_config(source)
    check_weight_files(source)
    return config


def check_weight_files(source: ReferenceSource) -> None:
    """Raises ConfigError where a folder that nothing more comes to lacks a complete set of safetensors files. Opens none."""
    folder = _folder_at_hand(source)
    if folder is not None:
        weight_files(folder, source.name)


def check_config(source: ReferenceSource) -> PretrainedConfig:
    """The model's config, if it is one that can be used here; only config.json is read.

    Raises:
        ConfigError: no config, code outside transformers without consent, not a causal language model, quantized, or stored in a
            layout that only ``from_pretrained`` can convert.
    """
    name = source.name
    try:
        raw, _ = PretrainedConfig.get_config_dict(source.path, revision=source.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: no config.json could be read from `{source.path}`: {one_line(error)}") from error
    if not raw:
        raise ConfigError(f"{name}: `{source.path}` holds no config.json; name a model folder or a hub id.")
    model_type = raw.get("model_type")
    own_code = "auto_map" in raw and source.trust_remote_code
    if model_type not in CONFIG_MAPPING and not own_code:
        raise ConfigError(
            f"{name}: model type {model_type!r} is not part of transformers, so {source.path} needs code of its own. Read that "
            "code, then set `trust_remote_code: true` for it, or choose another model."
        )
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method")
        raise ConfigError(
            f"{name}: {source.path} is quantized ({method}); name the unquantized model it was made from."
        )
    if not own_code and any(
        isinstance(c, WeightConverter) for c in get_checkpoint_conversion_mapping(model_type) or []
    ):
        raise ConfigError(
            f"{name}: model type {model_type!r} keeps its weights on disk in another layout than in memory, as mixtures of experts "
            "do, and cannot be read in shards; choose a dense model."
        )
    config = AutoConfig.from_pretrained(
        source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    if not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{name}: model type {model_type!r} is not a causal language model; choose one that is.")
    return config


def _folder_at_hand(source: ReferenceSource) -> Path | None:
    """The folder whose files are final: a local one, or a hub snapshot when nothing more can be downloaded."""
    if Path(source.path).is_dir():
        return Path(source.path)
    if is_offline_mode():
        return snapshot(source, local_files_only=True)
    return None


def local_folder(source: ReferenceSource, group: dist.ProcessGroup | None) -> Path:
    """The folder of the weights. A hub id is downloaded by one rank of each node, while the group waits. Collective."""
    if Path(source.path).is_dir():
        return Path(source.path)
    downloads = group is None or group.rank() == 0 or os.environ.get("LOCAL_RANK") == "0"
    with fail_together(group):
        if downloads:
            snapshot(source, local_files_only=False)
    with fail_together(group):
        return snapshot(source, local_files_only=True)


def snapshot(source: ReferenceSource, *, local_files_only: bool) -> Path:
    try:
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=["consolidated*", "*/*"],  # second copies of the weights for other programs
                local_files_only=local_files_only,
            )
        )
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{source.name}: `{source.path}` is neither a folder nor in the hub cache, and it cannot be downloaded now; download "
            "it where there is a network, or give its folder."
        ) from error


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, all there."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text())["weight_map"]
        files = sorted({folder / file for file in weight_map.values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ConfigError(
                f"{name}: {len(absent)} of {len(files)} weight files that {_INDEX} lists are missing in {folder}: "
                f"{some(absent)}; copy or download the folder again."
            )
        return files
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{name}: {folder} holds a PEFT adapter, not a whole model; merge it (`merge_and_unload`) and save the result."
        )
    others = sorted(p.name for ext in ("bin", "pt", "pth", "ckpt", "h5", "gguf") for p in folder.glob(f"*.{ext}"))
    raise ConfigError(
        f"{name}: no safetensors in {folder}"
        + (f" (found {some(others)})" if others else "")
        + f"; write them once with AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)."
    )


def num_parameters(folder: Path, name: str) -> int:
    """Elements of all tensors on disk, from the headers of the safetensors files."""
    total = 0
    for file in weight_files(folder, name):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 (no mapping)
    return total


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
