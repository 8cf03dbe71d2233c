"""`mrpo merge`: a LoRA run's adapter and its base as one ordinary model folder, as the base was: key names, dtypes, small files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.models.adapter import merge as merge_adapter
from mrpo_scale.models.adapter import needs_peft
from mrpo_scale.models.adapter_files import base_of
from mrpo_scale.models.plan import load_policy
from mrpo_scale.models.saving import cast_as_stored, read_source_files, share_weights, unvalidated_generation_config
from mrpo_scale.models.source import ReferenceSource, resolve_source

HELP = """usage: mrpo merge ADAPTER --output FOLDER [--base MODEL] [--trust_remote_code]

Adds a LoRA adapter (the folder of a run with `use_peft`, or any that peft wrote) to the weights of its base and writes the whole
model, which then serves as a policy, as a reference, and wherever else models go. In float32, rounded once to the base's dtypes.

  --base    the model it belongs to, where it is not what adapter_config.json says
"""


def merge(argv: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ConfigError: no such adapter or base, they do not fit together, or the output is there already.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    parser = argparse.ArgumentParser(prog="mrpo merge", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--trust_remote_code", action="store_true")
    try:
        flags, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"mrpo merge: {error}.") from None
    if unknown or flags.output is None:
        wrong = f"`{unknown[0]}` is not known" if unknown else "`--output FOLDER` is missing"
        raise ConfigError(f"mrpo merge: {wrong}; see `mrpo merge --help`.")
    if flags.output.exists():
        raise ConfigError(f"`--output {flags.output}` is there already; name another folder.")
    needs_peft()
    base, revision = base_of(flags.adapter)
    if flags.base:
        base, revision = flags.base, None
    merge_folder(flags.adapter, base, revision, flags.output, trust_remote_code=flags.trust_remote_code)
    print(f"{flags.adapter} added to {base}: {flags.output}")
    return 0


def merge_folder(adapter: Path, base: str, revision: str | None, output: Path, *, trust_remote_code: bool) -> None:
    """Write the whole model of an adapter and its base. Raises ConfigError as :func:`merge`."""
    source = resolve_source(ReferenceSource(base, base, revision, torch.float32, trust_remote_code))
    model = load_policy(source)
    files = read_source_files(model, source, tokenizer=True, chat_template=None)
    merged = merge_adapter(model, adapter)
    with unvalidated_generation_config(merged):
        merged.save_pretrained(output, state_dict=cast_as_stored(merged.state_dict(), files.dtypes))
    share_weights(output)
    files.write(output)
