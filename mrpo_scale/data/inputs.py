"""From a recipe to what a run works on: the rows it names, and their tokens for every model. No weights load here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from urllib.parse import quote

import datasets
import numpy as np
import pyarrow as pa

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.base.hash_keys import contains
from mrpo_scale.base.ranks import share_within_node
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.data import find_layout, load_rows
from mrpo_scale.data.pair_dataset import BadRowsError, PairDataset, check_prompts, check_token_ids, prepare_pairs
from mrpo_scale.data.remarks import Remark, log_remarks
from mrpo_scale.data.tokenization import ModelText, TextReader
from mrpo_scale.data.toy_world import resolve, world_at
from mrpo_scale.data.unread import unread_columns

TRAIN_SET, EVAL_SET = "train", "eval"
WEIGHTS_SET = "weights_split"  #: the pairs set aside for `ref_weights: validation`
_LONGEST_NAME = 100  #: of an evaluation set, as a file name has it
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_rows(script: ScriptArguments, config: MRPOConfig) -> tuple[Any, Any]:
    """The training and the held-out rows (None where there are none); the first rank of each host reads them for the others.

    Raises:
        ConfigError: no model or no data set is named, or it cannot be read.
    """
    for key in ("model_name_or_path", "dataset_name"):
        if not getattr(script, key):
            raise ConfigError(f"`{key}` is missing; name it in the recipe or as --{key}.")

    def read() -> tuple[Any, Any]:
        _make_toy_world(script)
        return _load_data(script, config)

    # Tables of `datasets` are files that are mapped, and travel as their names.
    return share_within_node(read)


def as_datasets(train: Any, evals: Any) -> tuple[datasets.Dataset | None, Any]:
    """What Python callers pass as ``train_dataset`` and ``eval_dataset``, as data sets: lists of rows become sets, and of a
    DatasetDict to train on, ``train`` is trained on and ``test``, where nothing else is, evaluated on.

    Raises:
        ConfigError: an IterableDataset, whose rows have no number; a DatasetDict without ``train``; anything else.
    """
    if isinstance(train, datasets.DatasetDict):
        if "train" not in train:
            raise ConfigError(
                f"`train_dataset` is a DatasetDict without `train`; pass one of its sets, such as train_dataset[{min(train)!r}]."
                if train
                else "`train_dataset` is a DatasetDict without sets; pass a Dataset."
            )
        evals = train.get("test") if evals is None else evals
        train = train["train"]
    if isinstance(evals, Mapping) and not isinstance(evals, datasets.IterableDatasetDict):
        return _as_dataset(train, "train_dataset"), {
            name: _as_dataset(rows, f"eval_dataset[{name!r}]") for name, rows in evals.items()
        }
    return _as_dataset(train, "train_dataset"), _as_dataset(evals, "eval_dataset")


def _as_dataset(rows: Any, key: str) -> datasets.Dataset | None:
    if rows is None or isinstance(rows, datasets.Dataset):
        return rows
    if isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(
            name for row in rows for name in row
        )  # `from_list` takes the columns of the first row only
        try:
            return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ConfigError(
                f"`{key}`: its rows make no table: {one_line(error)}; give a column values of one kind."
            ) from error
    if isinstance(rows, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ConfigError(
            f"`{key}` is an {type(rows).__name__}, whose rows have no number; load it without `streaming=True`, or make a Dataset "
            "of it with `Dataset.from_generator`: sets larger than memory stay on disk."
        )
    raise ConfigError(
        f"`{key}` is a {type(rows).__name__}; pass a `datasets.Dataset`, a DatasetDict or a list of rows (dicts)."
    )


class TextPlan(Protocol):
    """What a run's plan says of text (:class:`~mrpo_scale.models.plan.RunPlan`)."""

    @property
    def texts(self) -> Sequence[ModelText]: ...  # the distinct tokenizations, the policy's first
    @property
    def readers(self) -> Sequence[TextReader]: ...  # every model with the one that it reads


def prepare_sets(
    plan: TextPlan,
    args: MRPOConfig,
    train: datasets.Dataset | None,
    evals: datasets.Dataset | dict[str, datasets.Dataset] | None,
    findings: list[ConfigError] | None = None,
) -> dict[str, PairDataset]:
    """Tokenize every set for every model; the first rank of each host does the work, the others read its files.

    Args:
        findings: where given, what is wrong with the pairs of a set is added to it, and what is left of them comes all the same.

    Raises:
        ConfigError: an empty set, or pairs that cannot be used; with `weights_split`, no single held-out set to take it from.
    """
    sets = {TRAIN_SET: train, **evaluation_sets(evals)}
    if args.weights_fraction is not None:
        sets |= _set_aside(evals, args.weights_fraction, args)
    if args.process_index == 0:  # an earlier run may have had sets of other names
        for old in args.folder.glob("bad_rows_*.jsonl"):
            old.unlink()
    prepared = {
        split: prepare_set(plan, args, split, rows, findings) for split, rows in sets.items() if rows is not None
    }
    for split, pairs in prepared.items():
        if split != TRAIN_SET and TRAIN_SET in prepared:
            pairs.remarks = [*pairs.remarks, *(leaks := _leaks(pairs, prepared[TRAIN_SET], TRAIN_SET))]
            if args.process_index == 0:
                log_remarks(split, leaks)
    return prepared


def prepare_set(
    plan: TextPlan,
    args: MRPOConfig,
    split: str,
    rows: datasets.Dataset,
    findings: list[ConfigError] | None = None,
) -> PairDataset:
    """One set of :func:`prepare_sets`; ``split`` is what messages and files call it."""
    if len(rows) == 0:
        raise ConfigError(f"the {split} set has no rows; check `dataset_name` and the split keys.")
    layout = find_layout(rows, args.dataset_layout)
    with args.main_process_first(local=True, desc=f"tokenizing {split}"):
        try:
            prepared = prepare_pairs(
                rows,
                layout,
                plan.texts,
                max_length=args.max_length,
                options=args.pair_options,
                on_bad_row=args.on_bad_row,
                max_bad_rows=args.max_bad_rows,
                bad_rows_file=args.folder / f"bad_rows_{file_name(split)}.jsonl",
                split=split,
                readers=plan.readers,
                num_proc=args.dataset_num_proc,
                write=args.process_index == 0,
            )
        except BadRowsError as error:
            if findings is None:
                raise
            findings.append(error)
            prepared = error.pairs
    for check in (
        partial(check_token_ids, prepared, plan.texts, plan.readers, split),
        partial(check_prompts, prepared, args.repeated_prompt, args.max_bad_rows, split),
    ):
        try:
            check()
        except ConfigError as error:
            if findings is None:
                raise
            findings.append(error)
    unread = unread_columns(rows, layout, args.pair_options)
    prepared.remarks = [*prepared.remarks, *unread]
    if args.process_index == 0:
        log_remarks(split, unread)
    return prepared


def _leaks(pairs: PairDataset, other: PairDataset, split: str) -> list[Remark]:
    """How many of ``pairs`` are in ``other`` (of the name ``split``) too, whole, or with the same prompt."""
    whole = contains(pairs.row_keys, other.row_keys)
    prompt = np.isin(pairs.prompt_keys, other.prompt_keys) & ~whole
    counts = {f"known_pair:{split}": int(whole.sum()), f"known_prompt:{split}": int(prompt.sum())}
    return [Remark(word, n, {}) for word, n in counts.items() if n]


def evaluation_sets(evals: Any) -> dict[str, Any]:
    """{split: rows}: `eval` for a single set, `eval_NAME` for named ones, which is also what the Trainer calls their metrics. So no
    name that a user gives can be that of the training set or of the pairs that are set aside.

    Raises:
        ConfigError: a name that is no text, is empty, or is too long for the name of a file.
    """
    if not isinstance(evals, Mapping):
        return {EVAL_SET: evals}
    for name in evals:
        if not isinstance(name, str) or not name or len(file_name(name)) > _LONGEST_NAME:
            raise ConfigError(
                f"`eval_dataset`: {name!r} cannot name a set; use a text of 1 to {_LONGEST_NAME} letters and digits."
            )
    return {evaluation_split(name): rows for name, rows in evals.items()}


def evaluation_split(name: str) -> str:
    """What the evaluation set that a user calls ``name`` is called among a run's sets."""
    return f"{EVAL_SET}_{name}"


def file_name(split: str) -> str:
    """``split`` as part of a file's name: other names, other files, and none outside the folder (``org/set`` is a common name)."""
    return quote(split, safe=" ")


def check_steps(args: MRPOConfig, pairs: int, window: int) -> None:
    """Refuse `dataloader_drop_last` where it leaves nothing to train on.

    Args:
        pairs: of the training set.
        window: pairs per optimizer step over all ranks.

    Raises:
        ConfigError: they do not fill one step.
    """
    if args.dataloader_drop_last and pairs < window:
        raise ConfigError(
            f"`dataloader_drop_last: true` leaves no step to train: {pairs} pairs do not fill one of {window}. Set it to false, or "
            "lower `per_device_train_batch_size` or `gradient_accumulation_steps`."
        )


def _set_aside(held_out: Any, fraction: float, args: MRPOConfig) -> dict[str, datasets.Dataset]:
    """The held-out set in two: what is evaluated on, and what `ref_weights: validation` learns from. Weights that were chosen on
    the pairs of the evaluation would have seen its labels."""
    if not isinstance(held_out, datasets.Dataset) or len(held_out) < 2:
        found = f"{len(held_out)}" if held_out is not None else "none"
        raise ConfigError(
            f"`ref_weights: {' '.join(map(str, args.ref_weights))}` with `weights_split: {fraction}` needs one held-out set of two "
            f"pairs or more to split, got {found}; name a test split, or set `held_out`."
        )
    with args.main_process_first(local=True, desc="splitting the held-out set"):
        halves = held_out.train_test_split(test_size=max(1, round(fraction * len(held_out))), seed=args.seed)
    return {EVAL_SET: halves["train"], WEIGHTS_SET: halves["test"]}


def _make_toy_world(script: ScriptArguments) -> None:
    """Make the quickstart's world where a recipe names it and it is not there, in a process of its own: in this one a live ZeRO-3
    configuration would partition the little models over ranks that are not making any."""
    names = [script.model_name_or_path, *(spec.name for spec in script.datasets), *script.ref_models]
    if any("toy:" in str(name) for name in names) and not world_at().is_made:
        subprocess.run(
            [sys.executable, "-c", "from mrpo_scale.data.toy_world import make_world; make_world()"],
            env=without_ranks(),
            check=True,
        )


def without_ranks() -> dict[str, str]:
    """The environment for a process of its own, which must not take itself for a rank of this job."""
    return {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_NUM_THREADS")) and k not in RANKS
    }


def _load_data(script: ScriptArguments, config: MRPOConfig) -> tuple[Any, Any]:
    return load_rows(
        [replace(spec, name=resolve(spec.name)) for spec in script.datasets],
        config=script.dataset_config,
        columns=script.columns,  # type: ignore[arg-type]
        train_split=script.dataset_train_split,
        test_split=script.dataset_test_split,
        held_out=script.held_out,
        train_subset=script.train_subset,
        seed=config.seed,
        layout=config.dataset_layout,
        options=config.pair_options,
        num_proc=config.dataset_num_proc,
    )
