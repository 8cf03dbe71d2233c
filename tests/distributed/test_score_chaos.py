"""Scoring jobs that are killed at any moment, and jobs that share a cache: no row that was reported is lost, none is scored again.

`make chaos` kills 50 times (MRPO_CHAOS_KILLS), `make test` 5 times. MRPO_CHAOS_SEED chooses other moments.
"""

import json
import os
import random
import re
import signal
import stat
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mrpo_scale.base.atomic_files import TEMPORARY
from mrpo_scale.references import precompute as ahead
from mrpo_scale.references.store.cache import PartWriter, ReferenceStore
from mrpo_scale.references.store.identity import ReferenceIdentity
from tests.distributed.jobs import Job, Kill
from tests.tiny import pair_rows, write_models

KILLS = int(os.environ.get("MRPO_CHAOS_KILLS", "5"))
SEED = int(os.environ.get("MRPO_CHAOS_SEED", "0"))
ROWS = 240
PART_ROWS = 8  # instead of 4096, so that many kills meet a write
TOKENS_PER_FORWARD = 100  # about 2 pairs: 20 chunks and 15 parts per rank and reference
MOST_ROWS_OF_A_CHUNK = 20  # of a rank: 4 forwards of 100 tokens, and no pair has fewer than 20
ROW = np.dtype([("key", "V16"), ("logps", "<f4", 2), ("tokens", "<i4", 2)])  # V: S would drop zero bytes at the end
#: What a write consists of, in order; the process is killed right before each, or after the last.
STEPS = ("open", "flush", "link", "unlink", "flush folder", "report")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    models = write_models(folder)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(ROWS)))
    recipe = {
        "model_name_or_path": models["llama"],
        "ref_models": [models["qwen2"], models["gpt_neox"]],
        "dataset_name": str(data),
        "output_dir": str(folder / "out"),
        "ref_tokens_per_forward": TOKENS_PER_FORWARD,
        "use_cpu": True,
        "report_to": "none",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["score", "--config", folder / "recipe.yaml", "--ref_cache_dir"]


# --- in the ranks


class Recorder:
    """Appends what this rank scored, and what it was told is written, to files that outlive it."""

    def __init__(self, folder, die_at=None):
        self.folder, self.rank = Path(folder), os.environ["RANK"]
        self.die_at = die_at if die_at and die_at[0] == int(self.rank) else None
        self.writes = 0

    def append(self, kind, store, keys_N, logps_N2, tokens_N2):
        (self.folder / "begun").touch()
        rows = np.zeros(len(keys_N), ROW)
        rows["key"], rows["logps"], rows["tokens"] = keys_N.view("V16"), logps_N2, tokens_N2
        with open(self.folder / f"{kind}-{store.identity.key}-{self.rank}", "ab") as file:
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def die_before(self, step, descriptor=None):
        """SIGKILL if this is the moment: (rank, number of the write, step)."""
        if self.die_at == (int(self.rank), self.writes, step):
            if descriptor is not None:  # in the middle of the write
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, args):
        name = (
            Path(args[0]).name if event in ("open", "os.link", "os.remove") and isinstance(args[0], (str, Path)) else ""
        )
        if name.startswith(TEMPORARY):
            if event == "open":
                self.writes += 1
            self.die_before({"open": "open", "os.link": "link", "os.remove": "unlink"}[event])


def record(folder, die_at=None, part_rows=PART_ROWS):
    """Small parts, a record of them, and a death in the middle of one if asked for. Called in each rank before the command."""
    recorder = Recorder(folder, die_at)
    write_part, fsync = ReferenceStore.write_part, os.fsync

    class SmallParts(PartWriter):
        def __init__(self, store, seconds):
            super().__init__(store, part_rows, seconds)

        def add(self, *rows):
            recorder.append("scored", self.store, *rows)
            super().add(*rows)

    def reported(store, *rows):
        path = write_part(store, *rows)
        recorder.die_before("report")
        recorder.append("written", store, *rows)
        return path

    def flush(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        recorder.die_before("flush folder" if folder else "flush", None if folder else descriptor)
        fsync(descriptor)

    ahead.PartWriter, ReferenceStore.write_part = SmallParts, reported
    if recorder.die_at is not None:
        os.fsync = flush
        sys.addaudithook(recorder.audit)


# --- outside


class Cache:
    """A cache folder as somebody else opens it."""

    def __init__(self, root, identities):
        self.root, self.identities = root, identities

    def rows(self):
        """{reference key: its rows}; every byte of every part is verified on the way."""
        found = {}
        for identity in self.identities:
            store = ReferenceStore(self.root, identity)
            store.refresh()
            problems = [f"{report.name} {report.problem}" for report in store.verify() if report.problem]
            # Killed between making a folder and describing it: nothing is in it yet.
            assert not problems or (
                len(problems) == 1 and "reference.json is missing" in problems[0] and not len(store)
            )
            found[identity.key] = (
                np.concatenate([_rows(run) for run in store._runs]) if len(store) else np.zeros(0, ROW)
            )
        return found

    def abandoned(self):
        return len(list(self.root.glob(f"*/{TEMPORARY}*")))


def _rows(run):
    rows = np.zeros(len(run.keys_N), ROW)
    rows["key"], rows["logps"], rows["tokens"] = run.keys_N.view("V16"), run.logps_N2, run.tokens_N2
    return rows


def keys_of(rows):
    return {row.tobytes() for row in rows["key"]}


def by_key(rows):
    return {row["key"].tobytes(): row.tobytes() for row in rows}


def recorded(folder, kind, key, rank="*"):
    """What the ranks of one attempt recorded."""
    pieces = [np.frombuffer(path.read_bytes(), ROW) for path in sorted(Path(folder).glob(f"{kind}-{key}-{rank}"))]
    return np.concatenate(pieces) if pieces else np.zeros(0, ROW)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, rows in expected.items():
        theirs, ours = np.sort(found[key], order="key"), np.sort(rows, order="key")
        np.testing.assert_array_equal(theirs["key"].tobytes(), ours["key"].tobytes())
        np.testing.assert_array_equal(theirs["tokens"], ours["tokens"])
        np.testing.assert_allclose(theirs["logps"], ours["logps"], rtol=1e-5)


@pytest.fixture(scope="module")
def undisturbed(jobs, words, tmp_path_factory):
    """Identities, rows, and seconds of a scoring that nobody disturbs: until the first row and from there."""
    root, logs = tmp_path_factory.mktemp("undisturbed") / "cache", tmp_path_factory.mktemp("logs")
    (ended,) = jobs.run(Job([*words, root], 2, record, (str(logs),)))
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    identities = []
    for path in sorted(root.glob("*/reference.json")):
        described = json.loads(path.read_text())
        identities.append(ReferenceIdentity(described["name"], described["parts"], described["path"]))
    rows = Cache(root, identities).rows()
    assert [len(r) for r in rows.values()] == [ROWS] * 3
    first = min(path.stat().st_ctime for path in (root.glob("*/part-*")))
    last = max(path.stat().st_mtime for path in (root.glob("*/part-*")))
    return identities, rows, last - first


def choose_moment(rng, seconds, logs):
    """(where, Kill or None, death in a write or None)."""
    if rng.random() < 0.5:
        step = rng.choice(STEPS)
        return f"before `{step}` of a write", None, (rng.randrange(2), rng.randint(1, 12), step)
    victims = rng.choice([[0], [1], [0, 1]])
    if rng.random() < 0.2:
        return "since the start", Kill(victims, rng.uniform(0, 3)), None
    return "since the first row", Kill(victims, rng.uniform(0, seconds), since=str(logs / "begun")), None


def check_attempt(logs, before, after, reported):
    """What holds after every attempt, however it ended. Returns the most rows that a rank had scored and not stored."""
    most = 0
    for key, rows in after.items():
        here = by_key(rows)
        reported[key] |= by_key(recorded(logs, "written", key))
        gone = {k for k, row in reported[key].items() if here.get(k) != row}
        assert not gone, f"{len(gone)} rows that were reported written are gone or have other bits"
        again = keys_of(recorded(logs, "scored", key)) & keys_of(before[key])
        assert not again, f"{len(again)} rows were scored although the cache had them"
        for rank in range(2):
            scored, written = recorded(logs, "scored", key, rank), recorded(logs, "written", key, rank)
            unstored = keys_of(scored) - here.keys()
            # A part is whatever was scored since the last one.
            assert unstored <= keys_of(scored[len(written) :]), "rows of an earlier part than the last are not stored"
            most = max(most, len(unstored))
    return most


def test_killed_jobs_lose_no_row_and_score_none_again(jobs, words, undisturbed, tmp_path, capsys):
    identities, expected, seconds = undisturbed
    rng = random.Random(SEED)
    hits, sides, survivors = Counter(), Counter(), Counter()
    attempts, rounds, most_unstored, abandoned = 0, 0, 0, 0
    while hits.total() < KILLS:
        cache = Cache(tmp_path / f"cache-{rounds}", identities)
        reported = {identity.key: {} for identity in identities}
        rounds += 1
        complete = False
        while not complete:
            logs = tmp_path / f"logs-{attempts}"
            logs.mkdir()
            attempts += 1
            before = cache.rows()
            share = 1 - sum(map(len, before.values())) / (3 * ROWS)
            where, kill, die_at = choose_moment(rng, share * seconds, logs)
            if hits.total() == KILLS:
                kill = die_at = None
            (ended,) = jobs.run(
                Job([*words, cache.root], 2, record, (str(logs), die_at)), kill=kill, grace=rng.choice([0, 0.3, 5])
            )
            after = cache.rows()
            most_unstored = max(most_unstored, check_attempt(logs, before, after, reported))
            killed = [r for r, rank in enumerate(ended) if rank.status == -signal.SIGKILL and not rank.late]
            complete = all(rank.status == 0 for rank in ended)
            assert killed or complete, "\n".join(rank.err for rank in ended)
            if killed:
                hits[where] += 1
                sides["both ranks" if len(killed) == 2 else f"rank {killed[0]}"] += 1
                survivors.update(
                    "killed" if rank.late else f"exit {rank.status}" for rank in ended if rank.status != -9 or rank.late
                )
        assert_close(cache.rows(), expected)
        abandoned += cache.abandoned()
    with capsys.disabled():
        print(
            f"\n{hits.total()} kills in {attempts} attempts and {rounds} caches of {3 * ROWS} rows (seed {SEED}): {dict(sides)}, "
            f"{dict(sorted(hits.items()))}; ranks that outlived one: {dict(survivors)}; temporary files left: {abandoned}; most "
            f"rows that a rank had scored and not stored: {most_unstored}"
        )
    assert most_unstored < PART_ROWS + MOST_ROWS_OF_A_CHUNK


def test_two_jobs_at_once_fill_one_cache(jobs, words, undisturbed, tmp_path, capsys):
    """Two jobs of two ranks, all references: each ends with a whole cache, and what both have scored is little."""
    identities, expected, _ = undisturbed
    cache, logs = Cache(tmp_path / "cache", identities), [tmp_path / "logs-0", tmp_path / "logs-1"]
    for folder in logs:
        folder.mkdir()
    # What a job scores while the other works on the same chunk, or has not written it yet, is scored twice: so small chunks, each
    # written at once, as in a job whose data are many times what it scores in a minute.
    line = [*words, cache.root, "--ref_tokens_per_forward", TOKENS_PER_FORWARD // 4]
    both = jobs.run(*(Job(line, 2, record, (str(folder), None, 1)) for folder in logs))
    assert [[rank.status for rank in ended] for ended in both] == [[0, 0], [0, 0]], both[0][0].err + both[1][0].err
    found = cache.rows()
    assert_close(found, expected)
    twice, parts = 0, 0
    for key, rows in found.items():
        written = [by_key(recorded(folder, "written", key)) for folder in logs]
        twice += len(written[0].keys() & written[1].keys())
        for k, row in by_key(rows).items():
            assert row in [job.get(k) for job in written], "the cache has a row with bits that neither job was told of"
        parts += len(list((cache.root / key).glob("part-*")))
    for ended in both:
        assert ended[0].out.count("complete") == 3, ended[0].out
    said = Counter()  # per reference: the job that is the last to finish it sees all parts
    for ended in both:
        for name, count in re.findall(r"^(\w+): scored .* (\d+) were scored by both", ended[0].err, re.MULTILINE):
            said[name] = max(said[name], int(count))
    with capsys.disabled():
        print(
            f"\ntwo jobs at once: {twice} of {3 * ROWS} rows were scored twice, {parts} parts; the jobs counted {said}"
        )
    # Without a look at each other's parts it is every row.
    assert twice < 3 * ROWS / 2
