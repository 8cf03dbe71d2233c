"""Where a model comes from, and whatever can be known of it before its weights load."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.base.ranks import broadcast_from_rank0, fail_together, get_rank, is_first_of_node, world_group
from mrpo_scale.base.untrusted import read_json
from mrpo_scale.models.hub import download
from mrpo_scale.models.quantized import dequantizer

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SECOND_COPIES = ["consolidated*", "*/*"]  #: of the weights, for other programs
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  #: configs, tokenizers, chat templates


@dataclass(frozen=True)
class Server:
    """Who scores with a model that is not loaded here; see :class:`~mrpo_scale.config.model_spec.ModelSpec`."""

    url: str
    kind: str
    api_key_env: str | None
    concurrency: int


@dataclass(frozen=True)
class ReferenceSource:
    """Where a reference comes from. ``path`` is a local folder, or a hub id with an optional ``revision``; of a model that a
    ``server`` scores with, what that calls it, and ``revision`` the user's word for its weights."""

    name: str
    path: str
    revision: str | None = None
    dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    quantize: str | None = None  #: see references/low_bits.py
    server: Server | None = None
    commit: str | None = (
        None  #: of a hub id, what ``revision`` stood for when the run began; see :func:`resolve_source`
    )
    folder: Path | None = None  #: the snapshot of that commit on this machine, without the weights perhaps

    @property
    def files(self) -> str:
        """What transformers reads the small files from."""
        return str(self.folder or self.path)


def resolve_source(source: ReferenceSource) -> ReferenceSource:
    """Of a hub id: its commit, asked for once for all ranks, and the folder with its small files, downloaded once on each node.
    From then on no rank asks the hub for anything but weights. Collective over the world.

    Raises:
        ConfigError: there is no such model, or it cannot be read or downloaded.
    """
    if source.server is not None or Path(source.path).is_dir():
        return source
    commit = None
    with fail_together(world_group()):
        if get_rank() == 0:
            commit = _small_files(source, local_files_only=is_offline_mode()).name
    pinned = replace(source, commit=broadcast_from_rank0(commit, world_group()))
    with fail_together(world_group()):
        if is_first_of_node() and get_rank() != 0:
            _small_files(pinned, local_files_only=is_offline_mode())
    with fail_together(world_group()):
        return replace(pinned, folder=_small_files(pinned, local_files_only=True))


def _small_files(source: ReferenceSource, *, local_files_only: bool) -> Path:
    code = ["*.py"] if source.trust_remote_code else []
    ignored = [] if source.trust_remote_code else _SECOND_COPIES
    return _download(source, [*_SMALL_FILES, *code], ignored, local_files_only=local_files_only)


def check_source(source: ReferenceSource) -> PretrainedConfig:
    """Whatever can be known of a model before its weight files are opened. Runs no code of the model's unless the user agreed.

    Raises:
        ConfigError: see :func:`check_config` and :func:`check_weight_files`.
    """
    config = check_config(source)
    check_weight_files(source)
    return config


def check_weight_files(source: ReferenceSource) -> None:
    """Raises ConfigError where a folder that nothing more comes to lacks a complete set of safetensors files. Opens none."""
    folder = folder_at_hand(source)
    if folder is not None:
        weight_files(folder, source.name)


_NOT_HERE = (
    "there is no such folder here, so it was looked for on the hub; correct `model_name_or_path` or `ref_models`, or "
    "download the model where there is a network"
)


def check_config(source: ReferenceSource) -> PretrainedConfig:
    """The config of a causal language model, if it is one that can be used here; only config.json is read.

    Raises:
        ConfigError: see :func:`read_config`; or not a causal language model.
    """
    config = read_config(source)
    own_class = source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own_class and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ConfigError(
                f"{source.name}: model type {config.model_type!r} is not a causal language model; choose one that is."
            )
        if config.is_encoder_decoder:
            raise ConfigError(
                f"{source.name}: model type {config.model_type!r} is an encoder and a decoder, whose prompt goes through the "
                "encoder; choose a model whose text goes through a decoder alone."
            )
    return config


def read_config(source: ReferenceSource) -> PretrainedConfig:
    """A model's config, whatever its task; only config.json is read.

    Raises:
        ConfigError: no config, code outside transformers without consent, or quantized in a way that cannot be undone here.
    """
    name = source.name
    try:
        raw, _ = PretrainedConfig.get_config_dict(source.files, revision=source.revision)
    except (OSError, ValueError, RecursionError) as error:
        here = Path(source.path).is_dir()
        remedy = "get the model again" if here else _NOT_HERE
        raise ConfigError(
            f"{name}: no config.json could be read from `{source.path}` ({one_line(error)}): {remedy}."
        ) from error
    refuse_adapter(Path(source.path), name)
    if not raw or not isinstance(raw, dict):
        raise ConfigError(f"{name}: `{source.path}` holds no config.json; name a model folder or a hub id.")
    model_type = raw.get("model_type")
    own_code = "auto_map" in raw and source.trust_remote_code
    if model_type not in CONFIG_MAPPING and not own_code:
        raise ConfigError(
            f"{name}: model type {model_type!r} is not part of transformers, so {source.path} needs code of its own. Read that "
            "code, then set `trust_remote_code: true` for it, or choose another model."
        )
    try:
        config = AutoConfig.from_pretrained(
            source.files, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (StrictDataclassError, OSError, ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{name}: transformers cannot read config.json of `{source.path}`: {one_line(error)}; get the model again."
        ) from error
    own_kernel = str(config._attn_implementation or "")
    if "/" in own_kernel and source.attn_implementation is None:
        raise ConfigError(
            f"{name}: config.json of `{source.path}` asks for attention code from the hub ({own_kernel}), which would run here; "
            "set `attn_implementation` for this model, to sdpa or to that name if you trust it."
        )
    dequantizer(config, name)
    return config


def check_weights(folder: Path, config: PretrainedConfig, name: str) -> list[Path]:
    """The safetensors files of a model folder, whose headers are whole and hold enough for what config.json says. Otherwise a
    config of two lines has any amount of memory allocated, or layers built for ever.

    Raises:
        ConfigError: see also :func:`weight_files`.
    """
    files = weight_files(folder, name)
    tensors, elements = 0, 0
    for file in files:
        with open_weights(file, name) as stored:
            shapes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118 (no mapping)
        tensors += len(shapes)
        elements += sum(math.prod(shape) for shape in shapes)
    text_config = config.get_text_config()
    said = (getattr(text_config, key, 0) for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    hidden, vocabulary, layers = (
        value if isinstance(value, int) else 0 for value in said
    )  # code of its own may say lists
    if hidden * vocabulary > elements or layers > tensors:
        raise ConfigError(
            f"{name}: config.json in {folder} speaks of {layers} layers, {hidden} features and {vocabulary} tokens, but its weight "
            f"files hold {tensors} tensors of {elements} numbers in all; the two do not belong together, get the model again."
        )
    return files


def folder_at_hand(source: ReferenceSource) -> Path | None:
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
    with fail_together(group):
        if group is None or group.rank() == 0 or is_first_of_node():
            snapshot(source, local_files_only=is_offline_mode())
    with fail_together(group):
        return snapshot(source, local_files_only=True)


def snapshot(source: ReferenceSource, *, local_files_only: bool) -> Path:
    """The folder of a hub id's weights and configs on this machine. Raises ConfigError, see :func:`resolve_source`."""
    return _download(source, ["*.safetensors", "*.json"], _SECOND_COPIES, local_files_only=local_files_only)


def _download(source: ReferenceSource, allowed: list[str], ignored: list[str], *, local_files_only: bool) -> Path:
    revision = source.commit or source.revision
    return download(source.name, source.path, revision, allowed, ignored, local_files_only=local_files_only)


def refuse_adapter(folder: Path, name: str) -> None:
    """Raises ConfigError for a folder with a PEFT adapter, also beside whole weights: `from_pretrained` then loads another model,
    the one that the adapter's config names."""
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{name}: {folder} holds a PEFT adapter (adapter_config.json), not a whole model alone; make one of it with "
            f"`mrpo merge {folder} --output FOLDER`."
        )


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, all there."""
    refuse_adapter(folder, name)
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        files = sorted({folder / file for file in _listed_files(folder / _INDEX, name)})
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ConfigError(
                f"{name}: {len(absent)} of {len(files)} weight files that {_INDEX} lists are missing in {folder}: "
                f"{some(absent)}; copy or download the folder again."
            )
        return files
    others = sorted(p.name for ext in ("bin", "pt", "pth", "ckpt", "h5", "gguf") for p in folder.glob(f"*.{ext}"))
    raise ConfigError(
        f"{name}: no safetensors in {folder}"
        + (f" (found {some(others)})" if others else "")
        + f"; write them once with AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)."
    )


def _listed_files(index: Path, name: str) -> set[str]:
    """The file names in an index, which are names of files beside it and nothing else."""
    remedy = "get the model again"
    try:
        listing = read_json(index)
    except ValueError as error:
        raise ConfigError(f"{name}: {index} {error}; {remedy}.") from error
    weight_map = listing.get("weight_map") if isinstance(listing, dict) else None
    listed = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not listed or not all(isinstance(file, str) for file in listed):
        raise ConfigError(f"{name}: {index} has no `weight_map` of tensors to file names; {remedy}.")
    outside = [file for file in listed if Path(file).name != file or "\0" in file]
    if outside:
        raise ConfigError(
            f"{name}: {index} lists the weight file {outside[0]!r}, which is not the name of a file in its folder, so it is not "
            "read; put the weights beside it and correct the entry."
        )
    return set(listed)


def open_weights(file: Path, name: str) -> Any:
    """An open safetensors file. Raises ConfigError where its header is not one, or not of a file of this size."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{name}: {file} is not a whole safetensors file ({one_line(error)}); copy it again."
        ) from error


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
