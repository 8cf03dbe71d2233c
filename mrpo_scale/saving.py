"""A trained policy as an ordinary Hugging Face folder that loads as its source does: the source's key names, dtypes, small files.

transformers rewrites what it saves in the manner of its own version (``torch_dtype`` becomes ``dtype``, tokenizer classes get new
names), which other versions and other programs may not read. So the small files are the source's own, byte for byte.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from mrpo_scale.references.sharding import stored_tensors
from mrpo_scale.references.source import ReferenceSource, snapshot, weight_files

_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)
CHAT_TEMPLATE = "chat_template.jinja"


def folder_of(source: ReferenceSource) -> Path:
    """Where the files are that the policy was loaded from: of a hub id the snapshot on this machine, not what the hub has now."""
    return Path(source.path) if Path(source.path).is_dir() else snapshot(source, local_files_only=True)


def dtypes_on_disk(model: PreTrainedModel, source: Path) -> dict[str, torch.dtype]:
    """{name in ``model``: dtype of that tensor in the safetensors files of ``source``}; no tensor is read."""
    dtypes = {}
    for name, stored in stored_tensors(model, weight_files(source, "policy"), "policy").items():
        with safe_open(stored.file, framework="pt") as tensors:
            piece = tensors.get_slice(stored.key)
            dtypes[name] = piece[:0].dtype if piece.get_shape() else tensors.get_tensor(stored.key).dtype
    return dtypes


def cast_as_stored(state: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """``state`` in the dtypes of its source. Tied weights stay one tensor, or they would be written twice."""
    dtype_of = {tensor.data_ptr(): dtypes[name] for name, tensor in state.items() if name in dtypes}
    cast: dict[int, Tensor] = {}
    for tensor in state.values():
        address = tensor.data_ptr()
        if address not in cast:
            cast[address] = tensor.to(dtype_of.get(address, tensor.dtype))
    return {name: cast[tensor.data_ptr()] for name, tensor in state.items()}


def share_weights(folder: Path) -> None:
    """Let whoever may read the config read the weights: safetensors makes files that only their owner may read, and then a server
    of another user cannot load the model."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def copy_small_files(source: Path, folder: Path, *, tokenizer: bool, chat_template: str | None) -> None:
    """The source's config, and where ``tokenizer`` its tokenizer, over what transformers wrote to ``folder``.

    Args:
        chat_template: Jinja text that the policy was trained with in place of its own; goes into the file that loaders prefer.
    """
    for name in (*_MODEL_FILES, *(_TOKENIZER_FILES if tokenizer else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
