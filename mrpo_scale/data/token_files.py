"""The tokenized table on disk: blocks of rows, made by several processes, each a file that appears whole or not at all.

A start that was killed, or found the disk full, leaves the blocks that were finished, and the next one makes the others. Jobs that
start at once on one cache make blocks in orders of their own and leave out those that appear meanwhile: without a lock they share
the work, but for the last few blocks.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm.auto import tqdm

from mrpo_scale.base.atomic_files import atomic_file, is_about_disk, remove_abandoned
from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.data.pair_table import MAKE_ROOM, PairReader
from mrpo_scale.data.token_table import features_of, tokenize_row
from mrpo_scale.data.tokenization import ModelText

logger = logging.getLogger(__name__)

BLOCK = 20_000  #: rows of a block at least: what a killed process loses, seconds of its work
MOST_BLOCKS = 128  #: files stay mapped while a run lasts, and of open ones a process may have about a thousand
_BATCH = 2000  #: rows that are Python objects at once
_BYTES = 32 << 20  #: of tokens that are written together
_DAY = 86400.0


@dataclass(frozen=True)
class TokenTable:
    """What a tokenized table is made of: whoever has the same ``key`` makes the same.

    Attributes:
        path: of its only file, or what the names of its blocks begin with; None: it is kept in memory.
    """

    rows: datasets.Dataset
    reader: PairReader
    texts: Sequence[ModelText]
    max_length: int | None
    key: str
    path: Path | None

    def block(self, number: int) -> range:
        """The rows of a block; all are equally long, the first ones by a row longer."""
        count = self.blocks
        size, longer = divmod(len(self.rows), count)
        start = number * size + min(number, longer)
        return range(start, start + size + (number < longer))

    @property
    def blocks(self) -> int:
        """How many there are: it depends on the number of rows alone, so that any number of processes makes the same files."""
        return max(1, min(len(self.rows) // BLOCK, MOST_BLOCKS))

    def file(self, number: int) -> Path | None:
        """Of a block; named as `datasets` names those of several processes."""
        if self.path is None or self.blocks == 1:
            return self.path
        return self.path.with_name(f"{self.path.stem}_{number:05d}_of_{self.blocks:05d}{self.path.suffix}")

    def batches(self, number: int) -> Iterator[pa.RecordBatch]:
        """Tokenize a block. Batches are large: whoever reads a column of small ones has the columns beside it mapped too, and the
        whole table in memory."""
        schema = features_of(len(self.texts)).arrow_schema
        block, waiting = self.block(number), pa.Table.from_batches([], schema)
        for start in range(block.start, block.stop, _BATCH):
            columns = self.rows[start : min(start + _BATCH, block.stop)]
            names = list(columns)
            entries = [
                tokenize_row(
                    dict(zip(names, row, strict=True)),
                    layout=self.reader,
                    texts=self.texts,
                    max_length=self.max_length,
                )
                for row in zip(*columns.values(), strict=True)
            ]
            waiting = pa.concat_tables([waiting, pa.Table.from_pylist(entries, schema)])
            if waiting.nbytes >= _BYTES:
                yield from waiting.combine_chunks().to_batches()
                waiting = waiting.slice(0, 0)
        yield from waiting.combine_chunks().to_batches()

    def write(self, number: int) -> pa.Table | None:
        """Make a block and its file, unless another process has made it; in memory, return it."""
        file = self.file(number)
        if file is None:
            return pa.Table.from_batches(self.batches(number))
        if not file.exists():
            with (
                atomic_file(file) as stream,
                pa.ipc.new_stream(stream, features_of(len(self.texts)).arrow_schema) as out,
            ):
                for batch in self.batches(number):
                    out.write_batch(batch)
        return None

    def read(self, number: int) -> datasets.Dataset | None:
        """A block as far as its file is there and whole; one that is not, after a power cut for instance, is removed."""
        file = self.file(number)
        if file is None or not file.exists():
            return None
        try:
            table = datasets.Dataset.from_file(str(file))
            if len(table) == len(self.block(number)):
                return table
            problem = f"has {len(table)} rows and not {len(self.block(number))}"
        except (pa.ArrowInvalid, OSError) as error:
            problem = f"cannot be read ({one_line(error)})"
        logger.warning("%s %s: its rows are tokenized again", file, problem)
        file.unlink(missing_ok=True)
        return None


def tokenized(table: TokenTable, *, num_proc: int | None, desc: str) -> datasets.Dataset:
    """The whole table, with what is not there yet made by ``num_proc`` processes; None: one for a table of a single block, one
    for each core otherwise.

    Raises:
        ConfigError: the disk is full, or a process was killed; the blocks that were finished are there for the next start. And
            whatever a row raises.
    """
    if table.path is not None and table.path.parent.is_dir():
        with suppress(OSError):
            remove_abandoned(table.path.parent, older_than=_DAY)
    done: dict[int, datasets.Dataset] = {}
    for number in range(table.blocks):
        if (block := table.read(number)) is not None:
            done[number] = block
    missing = [number for number in range(table.blocks) if number not in done]
    if missing:
        if table.path is not None and table.blocks > 1:
            random.Random(os.urandom(8)).shuffle(missing)
        made = _make(table, missing, _processes(num_proc, len(missing), table.blocks), desc)
        for number in missing:
            block = (
                table.read(number)
                if table.path is not None
                else datasets.Dataset(made[number], fingerprint=f"{number}")
            )
            assert block is not None, f"{table.file(number)} was written and is gone"
            done[number] = block
    whole = datasets.concatenate_datasets([done[number] for number in range(table.blocks)])
    whole._fingerprint = table.key
    return whole


def _processes(asked: int | None, missing: int, blocks: int) -> int:
    cores = 1 if blocks == 1 else len(os.sched_getaffinity(0))
    return max(1, min(asked or cores, missing))


def _make(table: TokenTable, numbers: Sequence[int], processes: int, desc: str) -> Mapping[int, Any]:
    """Make blocks, with a bar that shows rows; those in memory are returned."""
    made: dict[int, Any] = {}
    first = len(table.rows) - sum(len(table.block(number)) for number in numbers)
    with tqdm(
        total=len(table.rows), initial=first, desc=desc, unit="row", disable=not datasets.is_progress_bar_enabled()
    ) as bar:
        try:
            for number, block in _one_by_one(table, numbers) if processes == 1 else _at_once(table, numbers, processes):
                made[number] = block
                bar.update(len(table.block(number)))
        except OSError as error:
            if table.path is None or not is_about_disk(error):
                raise
            raise ConfigError(
                f"tokens could not be written to {table.path.parent} ({one_line(error)}): {bar.n} of {len(table.rows)} rows are "
                f"there and are not tokenized again. {MAKE_ROOM}"
            ) from error
        except BrokenProcessPool as error:
            raise ConfigError(
                f"`dataset_num_proc: {processes}`: one of the processes that tokenize was killed, for want of memory perhaps: "
                f"{bar.n} of {len(table.rows)} rows are there and are not tokenized again; set fewer processes."
            ) from error
    return made


def _one_by_one(table: TokenTable, numbers: Sequence[int]) -> Iterator[tuple[int, pa.Table | None]]:
    for number in numbers:
        yield number, table.write(number)


_work: TokenTable | None = None  #: of a process that tokenizes


def _begin(table: TokenTable) -> None:
    global _work
    _work = table
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of many


def _write(number: int) -> pa.Table | None:
    assert _work is not None
    return _work.write(number)


def _at_once(table: TokenTable, numbers: Sequence[int], processes: int) -> Iterator[tuple[int, pa.Table | None]]:
    """Blocks as they are finished. Processes are forked: rows in memory and tokenizers are theirs without being sent."""
    left = iter(numbers)
    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (table,)) as pool:
        running: dict[Future, int] = {}
        # No more than are at work, so that after an error nothing is begun.
        for number in islice(left, processes):
            running[pool.submit(_write, number)] = number
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                for number in islice(left, 1):
                    running[pool.submit(_write, number)] = number
