"""Files of a model by its name on the hub, and why they cannot be had, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mrpo_scale.base.errors import ConfigError, one_line

_KEYS = "`model_name_or_path` or `ref_models`"
_LOG_IN = "`hf auth login`, or HF_TOKEN"


def download(
    name: str,
    path: str,
    revision: str | None,
    allowed: Sequence[str],
    ignored: Sequence[str],
    *,
    local_files_only: bool,
) -> Path:
    """The folder of the hub's cache with the files of ``path`` that match ``allowed``. A ``revision`` that is a commit whose files
    are here is answered without any request.

    Args:
        name: of the model in errors.

    Raises:
        ConfigError: there is no such model or revision, it is closed to this machine, or it cannot be downloaded now.
    """
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=list(allowed),
                ignore_patterns=list(ignored),
                local_files_only=local_files_only,
            )
        )
    except (HTTPError, HFValidationError, OSError) as error:  # HTTPError: the client's, of a connection that breaks off
        raise ConfigError(f"{name}: `{path}` {_why_not(revision, error)}.") from error


def _why_not(revision: str | None, error: Exception) -> str:
    """Why a hub id cannot be had, and what to do."""
    if isinstance(error, GatedRepoError):
        return f"is gated on the hub: accept its terms there, and log in here ({_LOG_IN})"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"is neither a folder here nor a model on the hub that this machine may see; correct {_KEYS}, or log in ({_LOG_IN}) if "
            "it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision `{revision}` on the hub; correct it"
    if isinstance(error, HFValidationError):
        return f"is neither a folder here nor the name of a model on the hub; correct {_KEYS}"
    if isinstance(error, LocalEntryNotFoundError):
        said = f" ({one_line(error.__cause__)})" if isinstance(error.__cause__, HTTPError) else ""
        return (
            f"is neither a folder nor whole in the hub cache, and it cannot be downloaded now{said}; correct {_KEYS}, or "
            "download it where there is a network"
        )
    return f"could not be downloaded ({one_line(error)}); start again: files that have arrived whole are not downloaded twice"
