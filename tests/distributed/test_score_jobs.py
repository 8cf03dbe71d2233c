"""Scoring and training jobs as a user starts them, and what they say when the cache or a reference is not as it should be."""

import ctypes
import hashlib
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mrpo_scale.references import precompute as ahead
from mrpo_scale.references import stores
from mrpo_scale.references.store.cache import ReferenceStore, list_cache
from mrpo_scale.references.store.identity import ReferenceIdentity
from tests.distributed.jobs import ROOT, Job
from tests.tiny import pair_rows, write_models
from tests.tools import lacking

ROWS = 40
NAMES = ["anchor", "qwen2", "gpt_neox"]


class Recipe:
    """A recipe of three tiny models in a folder of its own; the anchor is a copy, so that the policy may open its own weights."""

    def __init__(self, folder, **keys):
        self.folder = folder
        self.models = write_models(folder / "models")
        self.models["anchor"] = shutil.copytree(self.models["llama"], folder / "models" / "first")
        self.cache = folder / "cache"
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(ROWS)))
        self.path = folder / "recipe.yaml"
        self.path.write_text(
            json.dumps(
                {
                    "model_name_or_path": self.models["llama"],
                    "anchor": str(self.models["anchor"]),
                    "ref_models": [self.models["qwen2"], self.models["gpt_neox"]],
                    "dataset_name": str(data),
                    "output_dir": str(folder / "out"),
                    "use_cpu": True,
                    "report_to": "none",
                    "save_strategy": "no",
                    "per_device_train_batch_size": 4,
                    "max_steps": 1,
                    **keys,
                }
            )
        )

    def words(self, command, *more, cache=None):
        return [command, "--config", self.path, "--ref_cache_dir", cache or self.cache, *more]

    def weights(self, name):
        return Path(self.models[name]) / "model.safetensors"


@pytest.fixture(scope="module")
def recipe(jobs, tmp_path_factory):
    """Scored, never changed."""
    made = Recipe(tmp_path_factory.mktemp("recipe"))
    ((ended,),) = jobs.run(Job(made.words("score")))
    assert ended.status == 0, ended.err
    assert ended.out.count("complete") == 3
    return made


@pytest.fixture
def cache(recipe, tmp_path):
    """A copy of the full cache, to break."""
    return Path(shutil.copytree(recipe.cache, tmp_path / "cache"))


def run(jobs, words, ranks=1, **kwargs):
    """The only rank's end, or rank 0's."""
    (ended,) = jobs.run(Job(words, ranks, **kwargs))
    return ended[0]


def error_of(ended, status=2):
    """The one line that a user reads."""
    assert ended.status == status, (ended.status, ended.err)
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in ended.err, ended.err
    return lines[0]


def folder_of(cache, name):
    (entry,) = [entry for entry in list_cache(cache) if entry.description["name"] == name]
    return cache / entry.key


def parts_of(cache, name):
    return sorted(folder_of(cache, name).glob("part-*"))


def stored(cache):
    """{reference: {row key: its log-probs and counts}}, as somebody else reads the cache."""
    found = {}
    for entry in list_cache(cache):
        assert entry.problems == []
        described = entry.description
        store = ReferenceStore(cache, ReferenceIdentity(described["name"], described["parts"]))
        store.refresh()
        found[described["name"]] = {
            key.tobytes(): (logps.tolist(), tokens.tolist())
            for run in store._runs
            for key, logps, tokens in zip(run.keys_N.view("V16"), run.logps_N2, run.tokens_N2, strict=True)
        }
    return found


# --- a complete cache


@contextmanager
def opened_files(*folders):
    """{path: how often it was opened} inside the block, by any process: inotify, as Rust's opens pass Python's hooks by."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    if watch < 0:
        lacking("this kernel has no inotify")
    in_open, names = 0x20, {}
    for folder in folders:
        descriptor = libc.inotify_add_watch(watch, os.fsencode(folder), in_open)
        assert descriptor > 0, os.strerror(ctypes.get_errno())
        names[descriptor] = Path(folder)
    counts = {}
    try:
        yield counts
        while True:
            try:
                events = os.read(watch, 1 << 20)
            except BlockingIOError:
                break
            at = 0
            while at < len(events):
                descriptor, mask, _, length = struct.unpack_from("iIII", events, at)
                name = events[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                assert not mask & 0x4000, "the queue of inotify ran over"
                if name:
                    path = names[descriptor] / name
                    counts[path] = counts.get(path, 0) + 1
                at += 16 + length
    finally:
        os.close(watch)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_complete_cache_opens_no_weights_of_references(jobs, recipe, cache, ranks):
    references = [Path(recipe.models[name]) for name in NAMES]
    words = recipe.words("train", "--output_dir", cache.parent / "out", cache=cache)
    with opened_files(*references, recipe.models["llama"]) as opened:
        ended = run(jobs, words, ranks)
    assert ended.status == 0, ended.err
    weights = {path.parent.name: count for path, count in opened.items() if path.suffix == ".safetensors"}
    assert weights.pop("llama") >= 1, "the policy's own are read, and the watch sees it"
    assert weights == {}
    assert any(path.name == "config.json" for path in opened if path.parent in references)

    # The same watch sees a reference whose scores are not complete, and no other.
    parts_of(cache, "qwen2")[0].unlink()
    with opened_files(*references) as opened:
        assert run(jobs, words, ranks).status == 0
    assert {path.parent.name for path in opened if path.suffix == ".safetensors"} == {"qwen2"}


@contextmanager
def mounted(folder, options, source="tmpfs"):
    """A file system of its own; needs root."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, source, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        lacking(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_complete_cache_may_be_read_only(jobs, recipe, cache, tmp_path):
    parts_of(cache, "qwen2")[0].rename(tmp_path / "part")
    with mounted(tmp_path / "read-only", ["--bind", "-o", "ro"], cache) as frozen:
        ended = run(jobs, recipe.words("score", cache=frozen))
        line = error_of(ended)
        assert f"{frozen}/" in line and "cannot be written (Read-only file system)" in line
        line = error_of(run(jobs, recipe.words("train", cache=frozen)))
        assert "cannot be written (Read-only file system)" in line and "`ref_cache_dir`" in line
    (tmp_path / "part").rename(folder_of(cache, "qwen2") / "part-0000000000000001-00000000.safetensors")
    with mounted(tmp_path / "read-only", ["--bind", "-o", "ro"], cache) as frozen:
        for words in (("train", "--output_dir", tmp_path / "out"), ("score",), ("score", "--verify")):
            ended = run(jobs, recipe.words(*words, cache=frozen))
            assert ended.status == 0, ended.err


# --- mistakes and mishaps


def newer_part(cache):
    path = folder_of(cache, "qwen2") / "part-0000000000000002-00000000.safetensors"
    tensors = {"row_key": np.zeros((1, 16), np.uint8), "logps": -np.ones((1, 2), np.float32)}
    tensors["tokens"] = np.ones((1, 2), np.int32)
    metadata = {"format": "2", "reference": path.parent.name, "sha256": "0" * 64}
    data = bytearray(safetensors.numpy.save(tensors, metadata=metadata))
    at = data.index(b"0" * 64)
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data)
    return path


def corrupted_part(cache):
    path = parts_of(cache, "gpt_neox")[0]
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    return path


def test_a_part_that_cannot_be_used_stops_the_run_and_is_named(jobs, recipe, cache):
    """A newer format and a wrong byte, met by scoring and by training on one rank and on two."""
    path = newer_part(cache)
    for words in (["score"], ["train"]):
        line = error_of(run(jobs, recipe.words(*words, cache=cache)))
        assert str(path) in line and "format '2'" in line and "update mrpo_scale" in line
    path.unlink()
    path = corrupted_part(cache)
    for ranks in (1, 2):
        line = error_of(run(jobs, recipe.words("train", cache=cache), ranks))
        assert str(path) in line and "sha256" in line and "delete the file" in line
    ended = run(jobs, recipe.words("score", "--verify", cache=cache))
    assert ended.status == 1
    assert f"{path} does not have the bytes" in ended.out and "qwen2: 1 of 1 parts" in ended.out
    ended = run(jobs, recipe.words("score", "--list", cache=cache))
    assert ended.status == 2 and str(path) in error_of(ended)
    path.unlink()  # the remedy that the line names
    ended = run(jobs, recipe.words("score", cache=cache))
    assert ended.status == 0 and f"gpt_neox: scored {ROWS} rows" in ended.err and "qwen2: scored" not in ended.err


def test_a_cache_that_cannot_be_a_folder(jobs, recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        for command in ("score", "train"):
            line = error_of(run(jobs, recipe.words(command, cache=place)))
            assert f"`ref_cache_dir: {place}`: {tmp_path / 'file'} is a file; name another folder" in line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reference_that_vanished(jobs, recipe, tmp_path, ranks):
    """With its scores incomplete and complete: its files are part of the key, so either way it is named."""
    copy = Recipe(tmp_path)
    incomplete = error_of(run(jobs, [*vanish(copy)], ranks))
    assert "gpt_neox" in incomplete
    complete = Path(shutil.copytree(recipe.cache, tmp_path / "full"))
    line = error_of(run(jobs, copy.words("train", cache=complete), ranks))
    assert "gpt_neox" in line
    assert copy.models["gpt_neox"] in incomplete and copy.models["gpt_neox"] in line


def vanish(copy):
    shutil.rmtree(copy.models["gpt_neox"])
    return copy.words("train")


def test_weights_that_vanished(jobs, tmp_path):
    copy = Recipe(tmp_path)
    copy.weights("gpt_neox").unlink()
    for command in ("score", "train"):
        line = error_of(run(jobs, copy.words(command)))
        assert "gpt_neox: no safetensors in" in line and copy.models["gpt_neox"] in line


@pytest.mark.parametrize("ranks", [1, 2])
def test_follow_gives_up(jobs, recipe, cache, tmp_path, ranks):
    parts_of(cache, "qwen2")[0].unlink()
    words = recipe.words("train", "--ref_scoring", "follow", "--ref_follow_timeout", "0.001", cache=cache)
    line = error_of(run(jobs, words, ranks))
    assert f"qwen2 {ROWS}" in line and "mrpo score" in line and "`ref_follow_timeout`" in line and "anchor" not in line


def test_follow_trains_when_another_job_has_scored(jobs, recipe, cache, tmp_path):
    """`follow` on two ranks beside a scoring job: no reference is loaded, and the table of the other job says complete."""
    parts_of(cache, "qwen2")[0].unlink()
    words = recipe.words("train", "--ref_scoring", "follow", "--output_dir", tmp_path / "out", cache=cache)
    follower, scorer = jobs.run(Job(words, 2, look_often), Job(recipe.words("score", cache=cache)))
    assert [e.status for e in (*follower, *scorer)] == [0, 0, 0], follower[0].err + scorer[0].err
    assert f"qwen2: {ROWS} of {ROWS} rows" in follower[0].err and "\nreferences:\n" not in follower[0].err
    assert scorer[0].out.count("complete") == 3


def look_often():
    stores.POLL_SECONDS = 0.2


def test_a_reference_with_a_short_context(jobs, tmp_path):
    """Its pairs leave for all models, counted by reason; too many of them stop the run with the remedy."""
    copy = Recipe(tmp_path)
    config = Path(copy.models["qwen2"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 60}))
    line = error_of(run(jobs, copy.words("score")))
    count = int(re.search(r"(\d+) context_exceeded:qwen2", line)[1])
    assert 0 < count < ROWS and "longer context than qwen2 or raise `max_bad_rows`" in line
    ended = run(jobs, copy.words("score", "--max_bad_rows", "1"))
    assert ended.status == 0 and f"{ROWS - count} of {ROWS - count}" in ended.out
    assert f"{count} context_exceeded:qwen2" in ended.err


def test_words_that_fit_no_recipe(jobs, recipe, tmp_path):
    line = error_of(run(jobs, recipe.words("score", "--reference", "qwen2", "qwen3")))
    assert "qwen3" in line and "anchor, qwen2, gpt_neox" in line
    line = error_of(run(jobs, ["score", "--config", recipe.path]))
    assert "`ref_cache_dir` is missing" in line and "--ref_cache_dir" in line
    empty = tmp_path / "empty"
    line = error_of(run(jobs, recipe.words("inspect", cache=empty)))
    assert str(empty) in line and "mrpo score" in line
    assert not empty.exists() or not list(empty.glob("*/part-*"))
    ended = run(jobs, recipe.words("score", "--list", cache=empty))
    assert ended.status == 0 and ended.out.count(f"{ROWS} to score") == 3


# --- a full disk


def fill_disk(folder):
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_full_disk(jobs, recipe, tmp_path):
    """The disk fills while a job scores; with room, the same command completes, and what was stored is not scored again."""
    with mounted(tmp_path / "disk", ["-t", "tmpfs", "-o", "size=1m"]) as disk:
        watcher = threading.Thread(target=fill_when, args=(disk, "anchor"))
        watcher.start()
        (ended,) = jobs.run(Job(recipe.words("score", cache=disk), 2, small_parts))
        watcher.join()
        line = error_of(ended[0], 1)
        assert "no part could be written" in line and "No space left on device" in line and "Make room" in line
        assert ended[1].status == 1 and not ended[1].late
        had = stored(disk)
        assert had["anchor"] and sum(map(len, had.values())) < 3 * ROWS
        line = error_of(run(jobs, recipe.words("score", cache=disk)))
        assert "cannot be written (No space left on device)" in line and "make room" in line
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        ended = run(jobs, recipe.words("score", cache=disk), 2)
        assert ended.status == 0 and ended.out.count("complete") == 3
        now = stored(disk)
        assert [len(now[name]) for name in NAMES] == [ROWS] * 3
        assert all(now[name][key] == row for name in had for key, row in had[name].items())
        assert f"anchor: scored {ROWS - len(had['anchor'])} rows" in ended.err or len(had["anchor"]) == ROWS


def small_parts():
    """Called in each rank: every chunk is a part, and a chunk is a few pairs."""
    ahead.SECONDS_PER_PART = 0
    ahead.FORWARDS_PER_CHUNK = 1
    real = ahead._Rows.chunks
    ahead._Rows.chunks = lambda rows, tokens: real(rows, 200)


def fill_when(disk, name):
    """Once a reference has a part."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in disk.glob("*/reference.json"):
            if json.loads(path.read_text())["name"] == name and list(path.parent.glob("part-*")):
                fill_disk(disk)
                return
        time.sleep(0.001)


def limit_rank_1(after_parts):
    """The second rank can write no file from its ``after_parts``-th part on: RLIMIT_FSIZE, so the error is the system's own."""
    small_parts()
    write_part, written = ReferenceStore.write_part, []

    def limited(store, *rows):
        if os.environ["RANK"] == "1" and len(written) == after_parts:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        written.append(1)
        return write_part(store, *rows)

    ReferenceStore.write_part = limited


@pytest.mark.parametrize("command", ["score", "train"])
def test_all_ranks_end_when_one_cannot_write(jobs, recipe, tmp_path, command):
    after = 2 if command == "score" else 0
    words = recipe.words(command, "--max_steps", "20", cache=tmp_path / "cache")
    (ended,) = jobs.run(Job(words, 2, limit_rank_1, (after,)))
    line = error_of(ended[0], 1)
    assert "rank 1 failed" in line and "no part could be written" in line and "File too large" in line
    assert ended[1].status == 1 and not any(rank.late for rank in ended)
    stored(tmp_path / "cache")
    assert run(jobs, recipe.words("score", cache=tmp_path / "cache")).status == 0


# --- the real launcher, 20 s of imports per rank and command


chaos = pytest.mark.skipif("MRPO_CHAOS_KILLS" not in os.environ, reason="takes minutes: make chaos")


def launch(*words):
    """Two processes. (`accelerate launch --cpu --num_processes 2` starts one: accelerate has no such launcher without MPI.)"""
    config = ROOT / "launch/accelerate/cpu_zero3.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *words]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@chaos
def test_the_launcher_and_plain_python_score_alike(recipe, tmp_path):
    """Two ranks under the launch configuration of ZeRO-3, one process under plain python, one in the module's fixture."""
    done = launch("launch/score.py", *recipe.words("score", cache=tmp_path / "launched")[1:])
    out, err = done.communicate(timeout=500)
    assert done.returncode == 0 and out.count("complete") == 3, err
    plain = [sys.executable, "launch/score.py", *map(str, recipe.words("score", cache=tmp_path / "plain")[1:])]
    subprocess.run(plain, cwd=ROOT, check=True, timeout=500, capture_output=True)
    expected = stored(recipe.cache)
    for name in ("launched", "plain"):
        found = stored(tmp_path / name)
        assert {k: rows.keys() for k, rows in found.items()} == {k: rows.keys() for k, rows in expected.items()}
        for reference, rows in expected.items():
            ours, theirs = ([r[key] for key in sorted(rows)] for r in (rows, found[reference]))
            np.testing.assert_allclose([r[0] for r in theirs], [r[0] for r in ours], rtol=1e-5)
            assert [r[1] for r in theirs] == [r[1] for r in ours]


def process_of(rank, mark):
    """The pid of a launched rank whose command line has ``mark`` in it; None as long as there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if str(mark).encode() in words and f"RANK={rank}".encode() in variables.split(b"\0"):
            return int(process.name)
    return None


@chaos
def test_the_launcher_ends_when_one_rank_cannot_write(recipe, tmp_path):
    """From the first part on the second rank can write no file: its limit is set from outside."""
    cache = tmp_path / "cache"
    job = launch("launch/score.py", *recipe.words("score", cache=cache)[1:])
    try:
        while (pid := process_of(1, cache)) is None and job.poll() is None:
            time.sleep(0.5)
        while not list(cache.glob("*/part-*")) and job.poll() is None:
            time.sleep(0.001)
        assert pid is not None and job.poll() is None
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, 100))
        out, err = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 1, (job.returncode, out, err)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "rank 1 failed" in lines[0] and "File too large" in lines[0], err
    stored(cache)
