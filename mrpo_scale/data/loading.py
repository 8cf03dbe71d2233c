"""Rows from the hub or from local files, and the layout they are in."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from huggingface_hub.errors import HTTPError

from mrpo_scale.base.atomic_files import is_about_disk
from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.config.data_keys import Columns, DatasetSpec, Entry, PairOptions, parse_datasets
from mrpo_scale.data.layouts import LAYOUTS, AnyLayout
from mrpo_scale.data.mixing import mix
from mrpo_scale.data.pair_table import FEATURES, MAKE_ROOM, PairTable, group_numbers, pair_table
from mrpo_scale.data.remarks import log_remarks
from mrpo_scale.data.unread import unread_columns

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
DEFAULT_TEST_SPLIT = "test"
_PATTERN = re.compile(r"[*?\[\]]|::")  #: what `datasets` does not take for a part of a name
# First bytes of what `datasets` would unpack to disk without asking, whatever the file is called.
_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_ARCHIVES |= {b"\x04\x22\x4d\x18": "lz4", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}
#: Endings of compressed files, which say so: these `datasets` unpacks into its cache.
_PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
# RuntimeError: a loading script, which `datasets` no longer runs. The others: state.json, dataset_info.json and the YAML of a
# README.md that are not what they should be.
_UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError),
    *(yaml.YAMLError, datasets.exceptions.DatasetsError, HTTPError),
)


def load_rows(
    dataset_name: Entry | Sequence[Entry],
    *,
    config: str | None = None,
    columns: Columns = None,
    train_split: str = "train",
    test_split: str = DEFAULT_TEST_SPLIT,
    held_out: float | None = None,
    train_subset: float | None = None,
    seed: int = 42,
    layout: str = "auto",
    options: PairOptions | None = None,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The rows to train on and, where there are any, those to evaluate on. Of several data sets: their pair table.

    Args:
        dataset_name: hub id, or a local .json (lines or one array), .jsonl, .parquet, .arrow or .csv file (also packed: .gz, .bz2,
            .xz, .zst), which is a ``train`` split, or a folder of such files, whose names tell their splits. Several: see
            :mod:`mrpo_scale.data.mixing`.
        train_split, test_split: names, or parts as `datasets` writes them (``train[:10]``, ``train[10%:]``, ``a+b``). A test split
            is taken where the data set has it; another name than the default must exist.
        columns: those that are read, or how they are called, for data sets that do not say it themselves; see DatasetSpec.
        held_out: without a test split, how much of the train split to hold out: a fraction below 1, or a number of rows (of several
            sets: in all).
        train_subset: how much of what is left to train on, at random. Without a test split and ``held_out`` the remainder is
            evaluated on. Where several rows are answers to one prompt (layout ``helpsteer``), both count prompts.
        seed: of all random choices.
        layout, options: how rows are read, for data sets that do not say it themselves.

    Raises:
        ConfigError: the data cannot be found or read, or has no such split.
    """
    options = options or PairOptions(seed=seed)
    specs = parse_datasets(dataset_name)
    sets: list[tuple[datasets.Dataset, datasets.Dataset | None]] = []
    for spec in specs:
        train, test = _choose_splits(
            _load_splits(spec.name, spec.config or config), spec.name, spec.split or train_split, test_split
        )
        if columns is not None and spec.columns is None:
            spec = replace(spec, columns=columns)
        train, test = _name_columns(train, spec), None if test is None else _name_columns(test, spec)
        sets.append((train if spec.subset is None else _take_subset(train, spec, layout, seed), test))
    if train_subset is not None or (held_out is not None and any(test is None for _, test in sets)):
        groups = [_groups_of(train, spec, layout) for spec, (train, _) in zip(specs, sets, strict=True)]
        sets = _hold_out(sets, groups, held_out, train_subset, seed)
    if len(specs) == 1 and specs[0].layout is None:
        return sets[0]
    trains: list[datasets.Dataset] = []
    tests: list[datasets.Dataset] = []
    for spec, (train, test) in zip(specs, sets, strict=True):
        for rows, tables in ((train, trains), (test, tests)):
            if rows is not None:
                found = _find_layout_of(rows, spec.layout or layout, spec.label)
                if tables is trains:  # of a single set it is said with all else
                    log_remarks(spec.label, unread_columns(rows, found, options))
                tables.append(pair_table(rows, found, options, source=spec.label, num_proc=num_proc))
    return mix(trains, specs, seed), datasets.concatenate_datasets(tests) if tests else None


def find_layout(dataset: datasets.Dataset, name: str = "auto") -> AnyLayout:
    """The layout of ``dataset``: the one called ``name``, or under ``auto`` the first that its columns and first rows fit.

    Raises:
        ConfigError: no layout fits; says which columns there are and what the nearest layout needs.
    """
    columns = set(dataset.column_names)
    if dataset.features == FEATURES:
        return PairTable()
    if len(dataset) == 0:
        raise ConfigError("the data set has no rows; check `dataset_name` and the split keys.")
    if name != "auto":
        if name not in LAYOUTS:
            raise ConfigError(f"`dataset_layout: {name}` is not known; choose auto or one of {', '.join(LAYOUTS)}.")
        if LAYOUTS[name].missing(columns):
            raise ConfigError(
                f"`dataset_layout: {name}` does not fit: {_missing(LAYOUTS[name], columns)}. {_known(dataset)}"
            )
        return LAYOUTS[name]
    # A few rows, because the first one may be among the malformed ones.
    for example in dataset.with_format(None).select(range(min(10, len(dataset)))):
        for layout in LAYOUTS.values():
            if layout.matches(columns, example):
                return layout
    nearest = min(LAYOUTS.values(), key=lambda layout: _distance(layout, columns))
    reason = _missing(nearest, columns) or f"the first rows are not {nearest.describe}"
    raise ConfigError(
        f"`dataset_layout: auto`: no layout fits; nearest is `{nearest.name}`: {reason}. {_known(dataset)}"
    )


def _find_layout_of(rows: datasets.Dataset, name: str, label: str) -> AnyLayout:
    try:
        return find_layout(rows, name)
    except ConfigError as error:
        raise ConfigError(f"`{label}`: {error}") from None


def _choose_splits(
    splits: datasets.DatasetDict, dataset_name: str, train_split: str, test_split: str
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    wanted = {"dataset_train_split": train_split}
    if test_split != DEFAULT_TEST_SPLIT:
        wanted["dataset_test_split"] = test_split
    found = {key: _part_of(splits, dataset_name, key, split) for key, split in wanted.items()}
    return found["dataset_train_split"], found.get("dataset_test_split", splits.get(test_split))


def _part_of(splits: datasets.DatasetDict, dataset_name: str, key: str, split: str) -> datasets.Dataset:
    """A split, or the part of one that an instruction of `datasets` names: ``train[:10]``, ``train[10%:]``, ``a+b``."""
    if split in splits:
        return splits[split]
    problem = "has no such split"
    try:
        named = datasets.ReadInstruction.from_spec(split)
        pieces = named.to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, KeyError, AssertionError) as error:
        if "[" in split:
            problem = f"has no such part: {one_line(error)}"
        raise ConfigError(f"`{key}: {split}`: `{dataset_name}` {problem}; choose one of {', '.join(splits)}.") from None
    # `select` would slice rows that lie together, and a slice forgets which rows of the file it holds.
    parts = [
        splits[piece.splitname]._select_with_indices_mapping(np.arange(piece.from_ or 0, piece.to)) for piece in pieces
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _groups_of(rows: datasets.Dataset, spec: DatasetSpec, layout: str) -> np.ndarray:
    """The number of each row's prompt: `held_out`, `train_subset` and `subset` count prompts where several rows answer one."""
    return group_numbers(rows, _find_layout_of(rows, spec.layout or layout, spec.label)) if len(rows) else np.arange(0)


def _name_columns(rows: datasets.Dataset, spec: DatasetSpec) -> datasets.Dataset:
    """``rows`` with the columns that `columns` lists, or with other names where it maps them; a column that has one of these names
    already and is none of them leaves."""
    if not spec.columns:
        return rows
    given = spec.columns
    missing = sorted(set(given.values() if isinstance(given, Mapping) else given) - set(rows.column_names))
    if missing:
        there = ", ".join(rows.column_names)
        raise ConfigError(
            f"`dataset_name`: `{spec.label}` has no column `{missing[0]}`, which `columns` names; there are {there}."
        )
    if not isinstance(given, Mapping):
        return rows.select_columns(list(given))
    taken = set(given) & set(rows.column_names) - set(given.values())
    renamed = {theirs: ours for ours, theirs in given.items()}
    if len(renamed) < len(given):
        twice = next(theirs for ours, theirs in given.items() if renamed[theirs] != ours)
        raise ConfigError(f"`columns`: column `{twice}` of `{spec.label}` is given two names; leave one.")
    return rows.remove_columns(sorted(taken)).rename_columns({k: v for k, v in renamed.items() if k != v})


def _take_subset(rows: datasets.Dataset, spec: DatasetSpec, layout: str, seed: int) -> datasets.Dataset:
    """The random part of a set that its own `subset` asks for."""
    groups = _groups_of(rows, spec, layout)
    order = np.random.default_rng(seed).permutation(_total(groups))
    wanted = _count(f"dataset_name: {spec.label}, subset", float(spec.subset or 0), len(order))
    return _rows_of(rows, groups, order[:wanted])


def _hold_out(
    sets: Sequence[tuple[datasets.Dataset, datasets.Dataset | None]],
    groups: Sequence[np.ndarray],
    held_out: float | None,
    train_subset: float | None,
    seed: int,
) -> list[tuple[datasets.Dataset, datasets.Dataset | None]]:
    """Each set's random disjoint rows to train and to evaluate on; rows of one group stay together. A number of rows is that of
    all sets together, to which each gives in proportion to its size."""
    totals = [_total(numbers) for numbers in groups]
    without = [i for i, (_, test) in enumerate(sets) if test is None]
    held = [0] * len(sets)
    if held_out is not None:
        for i, count in zip(without, _counts("held_out", held_out, [totals[i] for i in without]), strict=True):
            held[i] = count
    left = [total - count for total, count in zip(totals, held, strict=True)]
    sizes = left if train_subset is None else _counts("train_subset", train_subset, left)
    split = []
    for (rows, test), numbers, count, size in zip(sets, groups, held, sizes, strict=True):
        order = np.random.default_rng(seed).permutation(
            _total(numbers)
        )  # as in train_test_split of `datasets`: test first
        train, rest = order[count : count + size], order[count + size :]
        if test is None:
            chosen = order[:count] if held_out is not None else rest
            test = _rows_of(rows, numbers, chosen) if len(chosen) else None
        whole = count == 0 and train_subset is None
        split.append((rows if whole else _rows_of(rows, numbers, train), test))
    return split


def _total(groups: np.ndarray) -> int:
    return int(groups.max(initial=-1)) + 1


def _rows_of(rows: datasets.Dataset, groups: np.ndarray, wanted: np.ndarray) -> datasets.Dataset:
    """The rows of the wanted groups, in the order in which the groups are listed."""
    place = np.full(int(groups.max()) + 1, -1)
    place[wanted] = np.arange(len(wanted))
    kept = np.flatnonzero(place[groups] >= 0)
    # `select` would slice rows that happen to lie together, and a slice forgets which rows of the file it holds.
    return rows._select_with_indices_mapping(kept[np.argsort(place[groups[kept]], kind="stable")])


def _load_splits(dataset_name: str, config: str | None) -> datasets.DatasetDict:
    path = Path(dataset_name).expanduser()
    if not path.exists() and _looks_local(dataset_name):
        raise ConfigError(
            f"`dataset_name: {dataset_name}`: there is no such file or folder (looked in {Path.cwd()}); correct the path."
        )
    if path.is_file():
        _check_file(path, dataset_name)
    try:
        splits = _read(path, dataset_name, config)
    except _UNREADABLE as error:
        reason = one_line(error.__cause__ or error)
        if is_about_disk(error):
            raise ConfigError(
                f"`dataset_name: {dataset_name}` cannot be kept on the disk: {reason}. {MAKE_ROOM}"
            ) from error
        remedy = "check the file's contents" if path.exists() else "check the name, the network and HF_TOKEN"
        raise ConfigError(f"`dataset_name: {dataset_name}` cannot be read: {reason}; {remedy}.") from error
    return splits


def _builder_of(name: str) -> tuple[str | None, str | None]:
    """Of a file's name: which of BUILDERS reads it, and how it says that it is packed."""
    path = Path(name)
    packed = _PACKED.get(path.suffix)
    return BUILDERS.get(Path(path.stem).suffix if packed else path.suffix), packed


def _check_file(path: Path, dataset_name: str) -> None:
    """Raises ConfigError for a file that is none of ours, or is packed in another way than its name says."""
    builder, packed = _builder_of(path.name)
    if builder is None:
        raise ConfigError(
            f"`dataset_name: {dataset_name}`: not one of {', '.join(BUILDERS)}, nor one of these packed as "
            f"{', '.join(_PACKED)}; convert the file."
        )
    kind = _compression(path)
    if kind != packed:
        found = f"is a {kind} archive by its contents, of any size once unpacked" if kind else f"is no {packed} file"
        raise ConfigError(
            f"`dataset_name: {dataset_name}` {found}; unpack it yourself and name what comes out."
            if kind
            else f"`dataset_name: {dataset_name}` {found} by its contents; correct its name."
        )
    _check_unpacker(path, dataset_name)


def _check_unpacker(path: Path, dataset_name: str) -> None:
    """Of a file or a folder: `datasets` unpacks zstd by a package of its own. Raises ConfigError where it is not here."""
    files = [path] if path.is_file() else path.rglob("*.zst")
    if not datasets.config.ZSTANDARD_AVAILABLE and any(file.suffix == ".zst" for file in files):
        raise ConfigError(
            f"`dataset_name: {dataset_name}` needs the package zstandard to be unpacked; `pip install zstandard`."
        )


def _read(path: Path, dataset_name: str, config: str | None) -> datasets.DatasetDict:
    path = _without_patterns(path)
    if path.is_file():
        builder, _ = _builder_of(path.name)
        assert builder is not None
        return datasets.load_dataset(builder, data_files={"train": str(path)})
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved: Any = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
    if path.is_dir():
        _check_unpacker(path, dataset_name)
        _stay_inside(path, config)
        return datasets.load_dataset(str(path), config, cache_dir=_cache_of(path))
    return datasets.load_dataset(dataset_name, config)


def _cache_of(folder: Path) -> str:
    """Where `datasets` keeps the rows of a local folder. Of one whose README.md names its files, 5.2.0 knows its last name alone:
    it would hand out the rows of another folder of that name, or those of before the files changed."""
    files = [(file, file.stat()) for file in sorted(folder.rglob("*")) if file.is_file()]
    state = [str(folder.absolute()), *(f"{file} {info.st_size} {info.st_mtime_ns}" for file, info in files)]
    digest = hashlib.sha256("\n".join(state).encode(errors="surrogateescape")).hexdigest()[:32]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "mrpo_scale_folders" / digest)


def _without_patterns(path: Path) -> Path:
    """The file or folder under a name that `datasets` takes as it is: it reads patterns into `*`, `?` and `[1]`, and a chain of
    file systems into `::`. The new name depends on the old alone, so that what `datasets` keeps is found again."""
    inside = path.rglob("*") if path.is_dir() else ()
    if not path.exists() or not (_PATTERN.search(str(path)) or any(_PATTERN.search(file.name) for file in inside)):
        return path
    target = path.absolute()
    links = Path(datasets.config.HF_DATASETS_CACHE) / "mrpo_scale_links"
    links.mkdir(parents=True, exist_ok=True)
    ending = "".join(path.suffixes[-2:]) if path.suffix in _PACKED else path.suffix
    link = links / (hashlib.sha256(os.fsencode(target)).hexdigest()[:32] + ending)
    _link(target, link)
    return link


def _link(target: Path, link: Path) -> None:
    """A link to a file; to a folder, of which `datasets` follows a link, a folder of links to its files."""
    if not target.is_dir() or target.is_symlink():
        with contextlib.suppress(FileExistsError):  # made before, or by another process just now
            link.symlink_to(target)
        return
    link.mkdir(exist_ok=True)
    children = {_PATTERN.sub(lambda found: f"-{ord(found[0][0]):x}-", child.name): child for child in target.iterdir()}
    for old in [path for path in link.iterdir() if path.name not in children]:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
    for name, child in children.items():
        _link(child, link / name)


def _stay_inside(folder: Path, config: str | None) -> None:
    """The README.md of a data folder may name its files, but none elsewhere on this machine or on another. Links are followed.

    Raises:
        ValueError: it names one.
    """
    builder = datasets.load_dataset_builder(str(folder), config)
    root = str(folder.resolve()) + os.sep
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not os.path.normpath(file).startswith((root, str(folder.absolute()) + os.sep)):
                raise ValueError(f"its README.md names {file}, which is not in the folder")


def _compression(file: Path) -> str | None:
    with open(file, "rb") as stream:
        head = stream.read(512)
    if head[257:262] == b"ustar":
        return "tar"
    return next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)


def _looks_local(name: str) -> bool:
    if _builder_of(name)[0] is not None or name.startswith((".", "/", "~")):
        return True
    return os.sep in name and not re.fullmatch(r"[\w.-]+/[\w.-]+", name)


def _count(key: str, value: float, total: int) -> int:
    """How many of ``total`` rows a fraction or a number of rows is; at least one, and at least one is left."""
    whole = float(value).is_integer()
    if not (0 < value < 1 or (whole and 1 <= value < total)):
        raise ConfigError(
            f"`{key}: {value}` must be a fraction between 0 and 1 or a whole number of rows below the {total} there are."
        )
    if total < 2:
        raise ConfigError(f"`{key}: {value}`: the train split has {total} row; add rows or remove `{key}`.")
    return int(value) if whole else math.ceil(value * total) if key == "held_out" else max(1, int(value * total))


def _counts(key: str, value: float, totals: Sequence[int]) -> list[int]:
    """How many rows of each set: a fraction of every one, or a number of rows shared out in proportion to their sizes."""
    if len(totals) < 2 or 0 < value < 1:
        return [_count(key, value, total) for total in totals]
    whole = _count(key, value, sum(totals))
    ends = [round(whole * end / sum(totals)) for end in np.cumsum(totals).tolist()]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _missing(layout: AnyLayout, columns: set[str]) -> str:
    names = [" or ".join(f"`{name}`" for name in needed.split("|")) for needed in layout.missing(columns)]
    return ", ".join(f"column {name} is missing" for name in names)


def _distance(layout: AnyLayout, columns: set[str]) -> tuple[int, int]:
    missing = len(layout.missing(columns))
    return missing, missing - len(layout.columns)


def _known(dataset: datasets.Dataset) -> str:
    needs = "; ".join(f"{layout.name} ({', '.join(layout.columns)})" for layout in LAYOUTS.values())
    return (
        f"Columns found: {', '.join(dataset.column_names) or 'none'}. Known layouts: {needs}; docs/data.md shows a row of each. "
        "Name the columns with the key `columns`, such as `columns: {prompt: question}`."
    )
