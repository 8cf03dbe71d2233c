"""Whether a run may write to its ``output_dir``: nothing of anybody else's is there that it would overwrite or believe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import refuse_links
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.model_spec import parse_ref_models

#: What a run writes over, and what tells that it was a run which wrote it before.
_OVERWRITTEN = ("README.md", ".gitignore", "config.json", "*.safetensors", "tokenizer*", "report.html")
_OF_A_RUN = ("run.json", "trainer_state.json", "training_args.bin", "checkpoint-*")


def check_output_folder(args: MRPOConfig, model: Any, ref_models: Sequence[str | Mapping[str, Any]]) -> None:
    """Make ``output_dir`` where it is missing, and refuse one that a run would do harm in; before anything is loaded.

    Args:
        model, ref_models: as the trainer takes them; only those that are folders matter.

    Raises:
        ConfigError: it cannot be made or is a file, is a model that the run reads, has a link to elsewhere for a file of its own,
            or holds files that no run has written; or ``resume_from_checkpoint``, whose pickles are run, is elsewhere.
    """
    folder = args.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"`output_dir: {folder}` cannot be made ({error.strerror}); name another folder, or make room for this one."
        ) from error
    references = parse_ref_models([*ref_models, *([args.anchor] if args.anchor else [])])
    named = [path for spec in references for path in (spec.model, spec.adapter) if path]
    for name in (*([model] if isinstance(model, str) else []), *named):
        if not Path(name).is_dir():
            continue
        if Path(name).samefile(folder):
            raise ConfigError(
                f"`output_dir: {folder}` is the folder of the model `{name}`, which would be overwritten; name another folder."
            )
        if Path(name).resolve().parent == folder.resolve() and Path(name).resolve().name.startswith("checkpoint-"):
            raise ConfigError(
                f"`output_dir: {folder}` holds the model `{name}` among its checkpoints, where this run's would overwrite it and "
                "`save_total_limit` delete it; name another folder."
            )
    refuse_links(folder, "output_dir")
    if not any(next(folder.glob(pattern), None) for pattern in _OF_A_RUN):
        foreign = sorted(path.name for pattern in _OVERWRITTEN for path in folder.glob(pattern))
        if foreign:
            raise ConfigError(
                f"`output_dir: {folder}` holds {', '.join(foreign[:3])}, which no run has written and this one would overwrite; "
                "name another folder, or an empty one."
            )
    checkpoint = args.resume_from_checkpoint
    if checkpoint and Path(checkpoint).exists() and not Path(checkpoint).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"`resume_from_checkpoint: {checkpoint}` is not in `output_dir: {folder}`. A checkpoint holds pickles, which run what "
            "they say: only a run's own are read. If this one is yours, resume with the `output_dir` that it is in."
        )
