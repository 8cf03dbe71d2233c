"""A whole data set, tokenized for every model: the pairs that every model can score, and what was left out and why."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.hash_keys import distinct
from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.layouts import AnyLayout
from mrpo_scale.data.pair_table import PairReader, as_pairs, describe_source, source_of
from mrpo_scale.data.pairs import NO_PAIR, SIDES, Cuts, PairTokens, PreferencePair
from mrpo_scale.data.remarks import Remark, log_remarks
from mrpo_scale.data.token_files import TokenTable, tokenized
from mrpo_scale.data.token_table import TEMPLATE_FLAGS, cuts_of, table_fingerprint
from mrpo_scale.data.tokenization import ModelText, TextReader, cut_pair

logger = logging.getLogger(__name__)

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_CONTEXT = ("chosen_context", "rejected_context")
_AT_ONCE = 1000  #: bad rows that are read together


class PairDataset(torch.utils.data.Dataset[tuple[PairTokens, ...]]):
    """The pairs that every model can score, in file order, tokenized for every ModelText. Arrow-backed.

    Attributes:
        counts: bad rows that were left out, by reason.
        cut_rows: the numbers, in this set, of pairs of which at least one response was cut; ``truncated``: how many.
        merged: pairs whose turns had to be merged, by model name; models without any are left out.
        trimmed, changed: pairs with a response off which a template trims white space, or of which it drops or rewrites more; the
            same way. Such a model scores what its template makes of the response.
        no_tools: pairs of whose prompts a template leaves out tools, tool calls or tool results; the same way.
        remarks: all that is said of the set in a form that people read, those three among it; see data/remarks.py.
        num_texts: number of ModelTexts.
        row_keys: [N] 16-byte strings (numpy S16), see :func:`row_key`.
        fingerprint: what the tokens depend on, as a hex digest.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        layout: PairReader,
        table: datasets.Dataset,
        names: Sequence[str],
        fingerprint: str,
        readers: Sequence[TextReader] = (),
    ) -> None:
        self._rows, self._layout, self._tokenized = rows, layout, table
        self.num_texts = len(names)
        self.fingerprint = fingerprint
        # Whole columns, never a row: each is mapped from the files, and millions of Python objects would be neither fast nor small.
        reasons = self._column("reason")
        good = pc.equal(reasons, "")
        words = pc.value_counts(reasons.filter(pc.invert(good))).to_pylist()
        self.counts = {one["values"]: one["counts"] for one in sorted(words, key=lambda one: -one["counts"])}
        self._good = np.flatnonzero(good.to_numpy())
        chosen, rejected = (self._column(f"{side}_messages").to_numpy()[self._good] > 0 for side in SIDES)
        self.cut_rows = np.flatnonzero(chosen | rejected)
        self.truncated = len(self.cut_rows)
        flags = (self._by_model(flag, names) for flag in TEMPLATE_FLAGS)
        self.merged, self.trimmed, self.changed, self.no_tools = flags
        self.remarks = self._remarks([_models_of(i, name, readers) for i, name in enumerate(names)])

    def _by_model(self, flag: str, names: Sequence[str]) -> dict[str, int]:
        counts = [self._how_many(f"{flag}_{i}") for i in range(len(names))]
        return {name: n for name, n in zip(names, counts, strict=True) if n}

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._tokenized.data.column(name)

    def _how_many(self, flag: str) -> int:
        """Pairs of this set for which a column of booleans is true."""
        return int(self._column(flag).to_numpy()[self._good].sum())

    def _remarks(self, models: Sequence[list[str]]) -> list[Remark]:
        """Of what each row's words and flags say; ``models``: of every ModelText, those that read it."""
        counts: dict[str, dict[str, int]] = {}
        for i, names in enumerate(models):
            found = {flag: self._how_many(f"{flag}_{i}") for flag in TEMPLATE_FLAGS}
            words = pc.value_counts(pc.list_flatten(self._column(f"remarks_{i}")))
            found |= {one["values"].as_py(): one["counts"].as_py() for one in words}
            for word, n in found.items():
                if n:
                    counts.setdefault(word, {}).update(dict.fromkeys(names, n))
        remarks = [Remark(word, max(by_model.values()), by_model) for word, by_model in counts.items()]
        repeated = self._how_many("repeats_prompt")
        twice = len(self._good) - len(distinct(self.row_keys))
        alone = {"stripped_prompt" if self._layout.strips else "repeated_prompt": repeated, "duplicate": twice}
        remarks += [Remark(word, n, {}) for word, n in alone.items() if n]
        return sorted(remarks, key=lambda remark: remark.place)

    @cached_property
    def prompt_keys(self) -> np.ndarray:
        """[N] int64: equal for pairs that answer the same prompt."""
        return self._column("prompt_key").to_numpy()[self._good]

    @cached_property
    def row_keys(self) -> np.ndarray:
        halves_N2 = np.empty((len(self._good), 2), dtype="<i8")
        for i in range(2):
            halves_N2[:, i] = self._column(f"row_key_{i}").to_numpy()[self._good]
        return halves_N2.view("S16").reshape(-1)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N, texts, 3] int32: tokens of prompt, chosen and rejected for each ModelText."""
        return self._counts(_IDS, _list_lengths)

    @cached_property
    def scored(self) -> np.ndarray:
        """[N, texts, 2] int32: tokens of chosen and rejected that are scored, for each ModelText: all but the context in them."""
        return self.lengths[..., 1:] - self._counts(_CONTEXT, _run_lengths)

    def _counts(self, fields: Sequence[str], count: Callable[[pa.ChunkedArray], np.ndarray]) -> np.ndarray:
        """[N, texts, fields] int32: ``count`` of these columns of each ModelText."""
        counts = np.empty((len(self._good), self.num_texts, len(fields)), dtype=np.int32)
        for text, place in np.ndindex(counts.shape[1:]):
            counts[:, text, place] = count(self._column(f"{fields[place]}_{text}"))[self._good]
        return counts

    def largest_id(self, text: int) -> tuple[int, int]:
        """The largest token id of a ModelText, and the first pair that has it; (-1, -1) without pairs."""
        largest_N = self._column(f"largest_id_{text}").to_numpy()[self._good]
        if not len(largest_N):
            return -1, -1
        where = int(largest_N.argmax())
        return int(largest_N[where]), where

    def __len__(self) -> int:
        return len(self._good)

    def __getitem__(self, row: int) -> tuple[PairTokens, ...]:
        return self.tokens(row)

    def tokens(self, row: int) -> tuple[PairTokens, ...]:
        """The pair's tokens, one PairTokens per ModelText."""
        stored = self._stored(row)
        return tuple(
            PairTokens(*(stored[f"{field}_{i}"] for field in PairTokens.__dataclass_fields__))
            for i in range(self.num_texts)
        )

    def select(self, rows: Sequence[int]) -> PairDataset:
        """Only these pairs, in this order; ``counts``, ``truncated`` and ``merged`` stay those of the whole set."""
        selected = copy.copy(self)
        for computed in ("row_keys", "prompt_keys", "lengths", "scored"):
            vars(selected).pop(computed, None)
        selected._good = self._good[np.asarray(rows, dtype=np.int64)]
        return selected

    def source_row(self, row: int) -> int:
        """The number, from 0, of the (first) row in the data set that this pair was read from."""
        return source_of(self._rows, int(self._good[row]))["row"]

    def source(self, row: int) -> str:
        """The same for messages: ``row 3``, ``rows 3 and 4``, and of which set in a mix."""
        return describe_source(source_of(self._rows, int(self._good[row])))

    def cut(self, row: int) -> tuple[bool, bool]:
        """Whether chosen, rejected lost their end to ``max_length``."""
        chosen, rejected = self._cuts(row)
        return chosen is not None, rejected is not None

    def uncut(self, row: int) -> PreferencePair:
        """The text as the data set has it."""
        return self._layout.to_pair(self._rows[int(self._good[row])])

    def pair(self, row: int) -> PreferencePair:
        """The text that is scored, after cuts."""
        return cut_pair(self.uncut(row), self._cuts(row))

    def bad_rows(self) -> Iterator[dict[str, Any]]:
        """``{row, reason, detail}`` of every pair left out, in order; ``other_row`` and ``dataset``: see ``source_of``."""
        bad = np.flatnonzero(pc.not_equal(self._column("reason"), "").to_numpy())
        for start in range(0, len(bad), _AT_ONCE):
            some = bad[start : start + _AT_ONCE]
            reasons, details = (self._column(name).take(pa.array(some)).to_pylist() for name in ("reason", "detail"))
            for i, reason, detail in zip(some.tolist(), reasons, details, strict=True):
                yield {**source_of(self._rows, i), "reason": reason, "detail": detail}

    def _cuts(self, row: int) -> Cuts:
        return cuts_of(self._stored(row))

    def _stored(self, row: int) -> dict[str, Any]:
        return self._tokenized[int(self._good[row])]


def prepare_pairs(
    rows: datasets.Dataset,
    layout: AnyLayout,
    texts: Sequence[ModelText],
    *,
    max_length: int | None,
    options: PairOptions | None = None,
    on_bad_row: Literal["skip", "error"] = "skip",
    max_bad_rows: float = 0.1,
    bad_rows_file: Path | None = None,
    split: str = "train",
    readers: Sequence[TextReader] = (),
    num_proc: int | None = None,
    cache_dir: Path | None = None,
    write: bool = True,
) -> PairDataset:
    """Tokenize a data set for every model and leave out, for all of them, the pairs that one of them cannot score.

    Args:
        texts: the policy's first.
        max_length: most tokens of prompt + response, in the policy's tokens; None cuts nothing.
        options: how ranked or scored answers become pairs.
        max_bad_rows: largest fraction of bad rows. Answers that tie are left out and counted, but are not bad rows.
        bad_rows_file: where bad rows are listed, if there are any, as JSON lines ``{split, row, reason, detail}``.
        split: what the rows are called in messages.
        readers: the models that read the texts, for messages.
        cache_dir: where tokens are kept for the next run; default: where ``datasets`` keeps ``rows``.
        write: whether this process writes ``bad_rows_file`` and logs; one process of a job should.

    Raises:
        BadRowsError: bad rows under ``on_bad_row: error``, too many of them, or none but them.
        ConfigError: see ModelText.render_prompt.
    """
    rows, reader = as_pairs(rows.with_format(None), layout, options or PairOptions(), num_proc)
    key = table_fingerprint(rows, reader, texts, max_length)
    path = None if cache_dir is None else cache_dir / f"pairs-{key}.arrow"
    if path is None and rows.cache_files:
        path = Path(rows._get_cache_file_path(key))  # where `map` would keep it
    desc = f"Tokenizing {split} for {len(texts)} model{'s' if len(texts) > 1 else ''}"
    table = tokenized(TokenTable(rows, reader, texts, max_length, key, path), num_proc=num_proc, desc=desc)
    pairs = PairDataset(rows, reader, table, [text.name for text in texts], key, readers)
    if write:
        _report(pairs, split, max_length, len(rows))
        if bad_rows_file is not None:
            _list_bad_rows(pairs, split, bad_rows_file)
    problem = _problem_with_bad_rows(pairs, split, on_bad_row, max_bad_rows, max_length)
    if problem:
        problem += f" All bad rows are listed in {bad_rows_file}." if pairs.counts and bad_rows_file is not None else ""
        raise BadRowsError(problem, pairs)
    return pairs


class BadRowsError(ConfigError):
    """Pairs that may not be trained on, because of those that were left out. ``pairs``: what is left."""

    def __init__(self, message: str, pairs: PairDataset) -> None:
        super().__init__(message)
        self.pairs = pairs


def _list_bad_rows(pairs: PairDataset, split: str, file: Path) -> None:
    """As JSON lines; without bad rows there is no file, not even that of an earlier run."""
    if not pairs.counts:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"split": split, **row}) + "\n" for row in pairs.bad_rows())


def check_token_ids(pairs: PairDataset, texts: Sequence[ModelText], readers: Sequence[TextReader], split: str) -> None:
    """Every token must have a row in the embedding of each model that reads it: a lookup beyond it ends a run, on a GPU with an
    assertion that names nothing.

    Raises:
        ConfigError: one has none; names model, token, id and rows.
    """
    largest = {text: pairs.largest_id(text) for text in {reader.tokenization for reader in readers}}
    for reader in readers:
        token, row = largest[reader.tokenization]
        if reader.num_embeddings is not None and token >= reader.num_embeddings:
            word: Any = texts[reader.tokenization].tokenizer.convert_ids_to_tokens(token)
            raise ConfigError(
                f"{reader.name}: its tokenizer makes token {token} ({word!r}) of {pairs.source(row)} of the {split} set, but its "
                f"embedding has {reader.num_embeddings} rows (`vocab_size` of config.json); resize it (`resize_token_embeddings`) "
                "and save the model, or give it the tokenizer that it was trained with."
            )


def check_prompts(pairs: PairDataset, repeated_prompt: str, most: float, split: str) -> None:
    """Refuse sets whose responses begin with their prompts: every model would read those twice.

    Args:
        most: fraction of the pairs that may do so; a greeting that is answered by a greeting does.

    Raises:
        ConfigError: under ``repeated_prompt: error``, more than that do.
    """
    repeated = next((remark.pairs for remark in pairs.remarks if remark.word == "repeated_prompt"), 0)
    if repeated_prompt == "error" and repeated > most * len(pairs):
        raise ConfigError(
            f"`repeated_prompt: error`: in {repeated} of {len(pairs)} pairs of the {split} set both responses begin with their "
            "prompt, which every model would read twice; set `repeated_prompt: strip` to take it off, or `keep` where it belongs."
        )


def _models_of(text: int, name: str, readers: Sequence[TextReader]) -> list[str]:
    """The models that read a ModelText; without any, what it is called itself."""
    return [reader.name for reader in readers if reader.tokenization == text] or [name]


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_value_length(column).to_numpy()


def _run_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """[rows] of lists of bounds [start, end, start, end, ...]: the sum of end - start."""
    bounds, values = _list_lengths(column), pc.list_flatten(column).to_numpy()
    if not len(values):  # no response of several turns
        return np.zeros(len(bounds), dtype=np.int32)
    runs = values[1::2] - values[::2]
    return np.bincount(np.repeat(np.arange(len(bounds)), bounds // 2), weights=runs, minlength=len(bounds))


def _report(pairs: PairDataset, split: str, max_length: int | None, num_rows: int) -> None:
    if pairs.counts:
        logger.info("%s: skipped %d of %d pairs: %s", split, num_rows - len(pairs), num_rows, _by_reason(pairs.counts))
    if pairs.truncated:
        logger.info("%s: cut responses of %d pairs to max_length %s", split, pairs.truncated, max_length)
    log_remarks(split, pairs.remarks)


def _by_reason(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.items())


def _problem_with_bad_rows(
    pairs: PairDataset,
    split: str,
    on_bad_row: str,
    max_bad_rows: float,
    max_length: int | None,
) -> str:
    """Why the pairs may not be used; empty where they may."""
    counts = {reason: n for reason, n in pairs.counts.items() if reason not in NO_PAIR}
    bad = sum(counts.values())
    total = len(pairs) + bad
    if not total:
        return f"the {split} set gives no pair: {_by_reason(pairs.counts)}; choose other data or `score_columns`."
    reasons = _by_reason(counts)
    first = next((row for row in pairs.bad_rows() if row["reason"] not in NO_PAIR), {}) if bad else {}
    if bad and on_bad_row == "error":
        return (
            f"`on_bad_row: error`: {describe_source(first)} of the {split} set is bad: {first['reason']} ({first['detail']}); "
            f"repair the {bad} bad rows ({reasons}) or set `on_bad_row: skip`."
        )
    if bad > max_bad_rows * total or not len(pairs):
        example = f" For example {describe_source(first)}: {first['reason']} ({first['detail']})." if bad else ""
        return (
            f"`max_bad_rows: {max_bad_rows}`: {bad} of {total} pairs of the {split} set are bad: {reasons}; "
            f"{_remedy(pairs, max_length)} or raise `max_bad_rows`.{example}"
        )
    return ""


def _remedy(pairs: PairDataset, max_length: int | None) -> str:
    short = [reason.partition(":")[2] for reason in pairs.counts if reason.startswith("context_exceeded:")]
    if "prompt_too_long" in pairs.counts:
        return f"raise `max_length: {max_length}`"
    if short:
        return f"lower `max_length: {max_length}`, take a model with a longer context than {' and '.join(short)}"
    return "repair the data"
