"""The tokenized table in blocks: the same pairs by any number of processes, and what was finished is not made again."""

import errno
import json
import logging
import multiprocessing
import os
import resource

import datasets
import numpy as np
import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data import LAYOUTS, token_files
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.token_files import TokenTable
from tests.data.test_tokenization import chatml, view

ROWS = 46


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Four blocks of 11 or 12 rows, read three at a time and written six at a time or so."""
    monkeypatch.setattr(token_files, "BLOCK", 10)
    monkeypatch.setattr(token_files, "_BYTES", 2000)
    monkeypatch.setattr(token_files, "_BATCH", 3)


def rows_in(folder):
    """46 rows on disk, every seventh of them bad."""
    file = folder / "rows.jsonl"
    lines = [
        {"prompt": f"row {i} of all", "chosen": f"yes {i}", "rejected": "" if i % 7 == 3 else f"no {i}" * (i % 5 + 1)}
        for i in range(ROWS)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "hf"))


def prepare(rows, folder=None, **options):
    options = {"max_length": 30, "max_bad_rows": 0.5, "cache_dir": folder, **options}
    return prepare_pairs(rows, LAYOUTS["strings"], [chatml(), view("other", vocab=280)], **options)


def told(pairs):
    """All that is known of a set."""
    return (
        [pairs.tokens(row) for row in range(len(pairs))],
        [pairs.pair(row) for row in range(len(pairs))],
        [pairs.source_row(row) for row in range(len(pairs))],
        *(pairs.row_keys.tolist(), pairs.prompt_keys.tolist(), pairs.lengths.tolist(), pairs.scored.tolist()),
        *(pairs.counts, list(pairs.bad_rows()), pairs.cut_rows.tolist(), pairs.fingerprint),
    )


def blocks(folder):
    return sorted(file.name.partition("_")[2] for file in folder.glob("*.arrow"))


ALL = [f"{i:05d}_of_00004.arrow" for i in range(4)]


@pytest.mark.processes
@pytest.mark.parametrize("on_disk", [True, False])
def test_processes_make_the_pairs_of_one_process(on_disk, tmp_path):
    rows = rows_in(tmp_path)
    if not on_disk:
        rows = datasets.Dataset.from_list(list(rows))
    folders = [tmp_path / str(n) if on_disk else None for n in range(2)]
    alone, together = (prepare(rows, folder, num_proc=n) for folder, n in zip(folders, (1, 3), strict=True))
    assert told(alone) == told(together)
    assert alone.counts == {"empty_response": 7} and len(alone) == 39 and alone.truncated
    assert not on_disk or [blocks(folder) for folder in folders] == [ALL, ALL]


def test_blocks_are_those_of_datasets_own_shards(tmp_path):
    """So that files which an earlier version's processes left under the same names hold the same rows."""
    rows = rows_in(tmp_path)
    table = TokenTable(rows, None, [], None, "key", tmp_path / "pairs.arrow")
    shards = [rows.shard(4, i, contiguous=True)["prompt"][:] for i in range(4)]
    assert [rows.select(table.block(i))["prompt"][:] for i in range(table.blocks)] == shards


def test_what_was_finished_is_used_and_files_that_are_not_whole_are_made_again(tmp_path, caplog, monkeypatch):
    rows = rows_in(tmp_path)
    expected = told(prepare(rows, tmp_path / "kept", num_proc=1))
    files = sorted((tmp_path / "kept").glob("*.arrow"))
    whole = files[2].read_bytes()
    files[1].write_bytes(files[1].read_bytes()[: len(whole) // 2])  # cut off somewhere
    files[2].write_bytes(files[0].read_bytes())  # a whole file, of 12 rows instead of 11
    files[3].unlink()
    abandoned = tmp_path / "kept" / ".tmp-1-aa"
    abandoned.write_bytes(whole)
    os.utime(abandoned, (0, 0))
    made, real = [], TokenTable.batches
    monkeypatch.setattr(TokenTable, "batches", lambda self, n: (made.append(n), real(self, n))[1])
    with caplog.at_level(logging.WARNING, "mrpo_scale"):
        assert told(prepare(rows, tmp_path / "kept", num_proc=1)) == expected
    assert sorted(made) == [1, 2, 3] and not abandoned.exists()
    said = [record.getMessage() for record in caplog.records if "tokenized again" in record.getMessage()]
    assert len(said) == 2 and "cannot be read" in said[0] and "has 12 rows and not 11" in said[1]
    assert told(prepare(rows, tmp_path / "kept", num_proc=1)) == expected and len(made) == 3


def test_a_block_that_another_job_has_made_meanwhile_is_not_made(tmp_path, monkeypatch):
    rows = rows_in(tmp_path)
    expected = told(prepare(rows, tmp_path / "other", num_proc=1))
    made, real = [], TokenTable.batches

    def batches(self, number):
        made.append(number)
        for file in (tmp_path / "other").glob("*.arrow"):  # the other job is done while this one makes its first block
            (tmp_path / "mine" / file.name).write_bytes(file.read_bytes())
        return real(self, number)

    monkeypatch.setattr(TokenTable, "batches", batches)
    assert told(prepare(rows, tmp_path / "mine", num_proc=1)) == expected
    assert len(made) == 1


@pytest.mark.processes
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_full_disk_is_one_line_and_nothing_is_lost(num_proc, tmp_path):
    """A limit on the size of files stands for the disk: the last block, of longer rows, does not fit."""
    rows = rows_in(tmp_path)
    longer = rows.map(lambda row, i: {"prompt": row["prompt"] + " and on" * 300 * (i > 40)}, with_indices=True)

    def start(room, sender):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            prepare(longer, tmp_path / "full", num_proc=num_proc, max_length=None)
        except ConfigError as error:
            sender.send(str(error))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=start, args=(30_000, sender))
    child.start()
    child.join()
    assert child.exitcode == 0
    (line,) = receiver.recv().splitlines()
    assert f"could not be written to {tmp_path / 'full'}" in line and os.strerror(errno.EFBIG) in line
    assert "HF_DATASETS_CACHE" in line and "of 46 rows are there" in line
    left = blocks(tmp_path / "full")
    assert (
        ALL[3] not in left and [file.name for file in (tmp_path / "full").iterdir() if "arrow" not in file.name] == []
    )
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "full").glob("*.arrow")}
    pairs = prepare(longer, tmp_path / "full", num_proc=1, max_length=None)
    assert blocks(tmp_path / "full") == ALL and all(file.stat().st_mtime_ns == t for file, t in before.items())
    assert told(pairs) == told(prepare(longer, tmp_path / "roomy", num_proc=1, max_length=None))


@pytest.mark.processes
def test_a_killed_process_is_told_of(tmp_path, monkeypatch):
    def killed(self, number):
        os._exit(9)

    monkeypatch.setattr(TokenTable, "write", killed)
    with pytest.raises(ConfigError, match=r"`dataset_num_proc: 2`: one of the processes that tokenize was killed"):
        prepare(rows_in(tmp_path), tmp_path / "kept", num_proc=2)


def test_a_column_is_never_a_list(tmp_path):
    """What is kept of every pair are numpy arrays, of 4 to 16 bytes an entry."""
    pairs = prepare(rows_in(tmp_path), tmp_path / "kept", num_proc=1)
    kept = [pairs._good, pairs.row_keys, pairs.lengths, pairs.scored, pairs.cut_rows]
    assert all(isinstance(array, np.ndarray) for array in kept)
    assert pairs.lengths.dtype == pairs.scored.dtype == np.int32 and pairs.row_keys.dtype == "S16"
