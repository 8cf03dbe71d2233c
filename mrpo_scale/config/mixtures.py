"""Data sets as other recipes name them, as entries of `dataset_name`: TRL's `datasets`, alignment-handbook's `dataset_mixture` and
`dataset_mixer` with `dataset_splits`. Their weights and fractions are parts of each set's own rows, so they are `subset` here;
`weight` is a share of the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_scale.base.errors import ConfigError

#: Keys of one set, of TRL's DatasetConfig and of alignment-handbook's, and what they are called here.
_NAMES = {
    **dict.fromkeys(("id", "path"), "name"),
    **dict.fromkeys(("config", "name"), "config"),
    "split": "split",
    "columns": "columns",
    **dict.fromkeys(("weight", "fraction"), "subset"),
}
_FILES = ("data_dir", "data_files")


def from_list(key: str, sets: Any) -> list[dict[str, Any]]:
    """Entries of `dataset_name` from a list of mappings with `path` (TRL's) or `id` (alignment-handbook's).

    Raises:
        ConfigError: no such list, or a key of a set that cannot be carried.
    """
    if not isinstance(sets, Sequence) or isinstance(sets, str) or not all(isinstance(one, Mapping) for one in sets):
        raise ConfigError(f"`{key}` must be a list of mappings; write them under `dataset_name` (docs/data.md)")
    return [_entry(key, one) for one in sets]


def _entry(key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in _FILES:
            raise ConfigError(f"`{key}`: `{name}: {value}`: name the folder or the file itself as `dataset_name`")
        if name not in _NAMES:
            raise ConfigError(f"`{key}`: unknown key `{name}`; known keys are {', '.join([*_NAMES, *_FILES])}")
        entry[_NAMES[name]] = value
    if "name" not in entry:
        raise ConfigError(f"`{key}`: one of its sets has no name; give it an `id` or a `path`")
    return with_subset(entry, entry.pop("subset", None))


def from_mixer(key: str, mixer: Any) -> list[dict[str, Any]]:
    """Entries of `dataset_name` from a mapping of names to parts of their rows. Raises ConfigError where it is none."""
    if not isinstance(mixer, Mapping):
        raise ConfigError(f"`{key}` must map names to fractions; write the sets under `dataset_name` (docs/data.md)")
    return [with_subset({"name": name}, part) for name, part in mixer.items()]


def with_subset(entry: dict[str, Any], part: Any) -> dict[str, Any]:
    """An entry that takes `part` of its rows; 1.0 is the whole. A number above 1 counts rows."""
    whole = part is None or (isinstance(part, (int, float)) and not isinstance(part, bool) and part == 1)
    return entry if whole else {**entry, "subset": part}


def splits_of(key: str, splits: Any) -> dict[str, str]:
    """`dataset_train_split` and `dataset_test_split` from a list of splits, told apart by their names as alignment-handbook does.

    Raises:
        ConfigError: two of a kind, or a split that is neither.
    """
    found: dict[str, str] = {}
    for split in [splits] if isinstance(splits, str) else list(splits or ()):
        kind = next((kind for kind in ("train", "test") if kind in str(split)), None)
        if kind is None or f"dataset_{kind}_split" in found:
            raise ConfigError(
                f"`{key}: {splits}`: write `dataset_train_split` and `dataset_test_split`, or a `split` for each set of "
                "`dataset_name`"
            )
        found[f"dataset_{kind}_split"] = str(split)
    return found
