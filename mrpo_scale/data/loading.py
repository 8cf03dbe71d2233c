"""Rows from the hub or from local files, and the layout they are in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import datasets

from mrpo_scale.data.layouts import LAYOUTS, Layout
from mrpo_scale.errors import ConfigError

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
DEFAULT_TEST_SPLIT = "test"


def load_rows(
    dataset_name: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str = DEFAULT_TEST_SPLIT,
    held_out: float | None = None,
    seed: int = 42,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The rows to train on and, where there are any, those to evaluate on.

    Args:
        dataset_name: hub id, or a local .json (lines or one array), .jsonl, .parquet, .arrow or .csv file, which is a ``train``
            split, or a folder of such files, whose names tell their splits.
        test_split: taken where the data set has it; another name than the default must exist.
        held_out: without a test split, how much of the train split to hold out: a fraction below 1, or a number of rows.
        seed: of the random choice of held-out rows.

    Raises:
        ConfigError: the data cannot be found or read, or has no such split.
    """
    splits = _load_splits(dataset_name, config)
    wanted = {"dataset_train_split": train_split}
    if test_split != DEFAULT_TEST_SPLIT:
        wanted["dataset_test_split"] = test_split
    for key, split in wanted.items():
        if split not in splits:
            raise ConfigError(
                f"`{key}: {split}`: `{dataset_name}` has no such split; choose one of {', '.join(splits)}."
            )
    train = splits[train_split]
    if test_split in splits:
        return train, splits[test_split]
    if held_out is None:
        return train, None
    halves = train.train_test_split(test_size=_test_size(held_out, len(train)), seed=seed)
    return halves["train"], halves["test"]


def find_layout(dataset: datasets.Dataset, name: str = "auto") -> Layout:
    """The layout of ``dataset``: the one called ``name``, or under ``auto`` the first that its columns and first rows fit.

    Raises:
        ConfigError: no layout fits; says which columns there are and what each layout needs.
    """
    columns = set(dataset.column_names)
    if name != "auto":
        if name not in LAYOUTS:
            raise ConfigError(f"`dataset_layout: {name}` is not known; choose auto or one of {', '.join(LAYOUTS)}.")
        if not set(LAYOUTS[name].columns) <= columns:
            raise ConfigError(
                f"`dataset_layout: {name}` does not fit: {_missing(LAYOUTS[name], columns)}. {_known(dataset)}"
            )
        return LAYOUTS[name]
    # A few rows, because the first one may be among the malformed ones.
    for example in dataset.with_format(None).select(range(min(10, len(dataset)))):
        for layout in LAYOUTS.values():
            if layout.matches(columns, example):
                return layout
    nearest = min(LAYOUTS.values(), key=lambda lay: (len(set(lay.columns) - columns), -len(set(lay.columns) & columns)))
    reason = _missing(nearest, columns) or f"the first rows are not {nearest.describe}"
    raise ConfigError(
        f"`dataset_layout: auto`: no layout fits; nearest is `{nearest.name}`: {reason}. {_known(dataset)}"
    )


def _load_splits(dataset_name: str, config: str | None) -> datasets.DatasetDict:
    path = Path(dataset_name).expanduser()
    if not path.exists() and _looks_local(dataset_name):
        raise ConfigError(
            f"`dataset_name: {dataset_name}`: there is no such file or folder (looked in {Path.cwd()}); correct the path."
        )
    if path.is_file() and path.suffix not in BUILDERS:
        raise ConfigError(f"`dataset_name: {dataset_name}`: not one of {', '.join(BUILDERS)}; convert the file.")
    try:
        splits = _read(path, dataset_name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        remedy = "check the file's contents" if path.exists() else "check the name, the network and HF_TOKEN"
        raise ConfigError(f"`dataset_name: {dataset_name}` cannot be read: {reason}; {remedy}.") from error
    return splits


def _read(path: Path, dataset_name: str, config: str | None) -> datasets.DatasetDict:
    if path.is_file():
        return datasets.load_dataset(BUILDERS[path.suffix], data_files={"train": str(path)})
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved: Any = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
    return datasets.load_dataset(str(path) if path.exists() else dataset_name, config)


def _looks_local(name: str) -> bool:
    if Path(name).suffix in BUILDERS or name.startswith((".", "/", "~")):
        return True
    return os.sep in name and not re.fullmatch(r"[\w.-]+/[\w.-]+", name)


def _test_size(held_out: float, num_rows: int) -> float | int:
    """What ``train_test_split`` calls it: a float is a fraction, an integer a count."""
    whole = float(held_out).is_integer()
    if not (0 < held_out < 1 or (whole and 1 <= held_out < num_rows)):
        raise ConfigError(
            f"`held_out: {held_out}` must be a fraction between 0 and 1 or a whole number of rows below the {num_rows} there are."
        )
    if num_rows < 2:
        raise ConfigError(f"`held_out: {held_out}`: the train split has {num_rows} row; add rows or remove `held_out`.")
    return int(held_out) if whole else held_out


def _missing(layout: Layout, columns: set[str]) -> str:
    return ", ".join(f"column `{column}` is missing" for column in layout.columns if column not in columns)


def _known(dataset: datasets.Dataset) -> str:
    needs = "; ".join(f"{layout.name} ({', '.join(layout.columns)}: {layout.describe})" for layout in LAYOUTS.values())
    return f"Columns found: {', '.join(dataset.column_names) or 'none'}. Known layouts: {needs}. Rename the columns."
