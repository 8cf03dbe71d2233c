"""What a model's files hold against what its config says, from their headers: before anything of it is loaded.

``from_pretrained`` fills what a folder lacks with random numbers, leaves out what it does not know, and says so in a log only.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from mrpo_scale.models.source import ReferenceSource, check_source, check_weights, folder_at_hand
from mrpo_scale.models.stored import build_on_meta, locate_tensors


def check_model(source: ReferenceSource) -> PretrainedConfig:
    """:func:`check_source`, and that the files hold the whole model, where they are at hand: of a hub id that may still be
    downloaded, :func:`check_tensors` has to follow.

    Raises:
        ConfigError: see :func:`check_source` and :func:`check_tensors`.
    """
    config = check_source(source)
    folder = folder_at_hand(source)
    if folder is not None:
        check_tensors(source, folder, config)
    return config


def check_tensors(source: ReferenceSource, folder: Path, config: PretrainedConfig) -> None:
    """Headers alone are read, but for tied tensors of which the files have two.

    Raises:
        ConfigError: a tensor of the model is missing in ``folder``, has another shape, or belongs to another model, such as the
            head of a classifier.
    """
    files = check_weights(folder, config, source.name)
    locate_tensors(build_on_meta(source, config), files, source.name)
