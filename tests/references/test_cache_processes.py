"""The store under real failures: killed writers, two writers at once, full disks."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mrpo_scale.base.errors import ConfigError, TrainingError
from mrpo_scale.references.store.cache import PartWriter, list_cache
from tests.scored_rows import IDENTITY, assert_holds, new_store, opened, rows
from tests.tools import lacking

pytestmark = pytest.mark.processes

ROOT = str(Path(__file__).parents[2])

# Writes parts of `rows` rows from row `start` on, and says after each which rows are on the disk.
WRITER = f"""
import sys
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from tests.scored_rows import IDENTITY, rows
from mrpo_scale.references.store.cache import ReferenceStore
root, start, count, per_part, shift = Path(sys.argv[1]), *map(int, sys.argv[2:5]), float(sys.argv[5])
store = ReferenceStore(root, IDENTITY)
store.prepare_to_write()
print("ready", flush=True)
sys.stdin.readline()
for at in range(start, start + count, per_part):
    store.write_part(*rows(at, at + per_part, shift))
    print(at, at + per_part, flush=True)
"""


@contextmanager
def writer(root, start, count, per_part, shift=0.0):
    """A process that has opened the store and waits for a line."""
    command = [sys.executable, "-c", WRITER, str(root), *map(str, (start, count, per_part, shift))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_killed_writer_loses_no_row_it_reported(tmp_path):
    """SIGKILL at ten random moments; parts of two sizes, so that the kills hit the write and what is around it."""
    rng = random.Random(0)
    reported = []
    for attempt in range(10):
        start = attempt * 10**6
        with writer(tmp_path, start, 10**6, rng.choice([64, 8192])) as process:
            go(process)
            first = process.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            lines = [first, *process.stdout.read().splitlines(keepends=True)]
            reported.append((start, int([line for line in lines if line.endswith("\n")][-1].split()[1])))
        assert process.wait() == -signal.SIGKILL
        store = opened(tmp_path)
        for first_row, stop in reported:
            assert_holds(store, first_row, stop)
        assert all(report.problem is None for report in store.verify())
    cut_short = len(list(store.folder.glob(".tmp-*")))
    assert cut_short, "no kill hit a writer at work: this test shows nothing"
    # Young ones may be another job's; old ones are garbage.
    new_store(tmp_path)
    assert len(list(store.folder.glob(".tmp-*"))) == cut_short
    for path in store.folder.glob(".tmp-*"):
        os.utime(path, (time.time() - 90_000,) * 2)
    new_store(tmp_path)
    assert not list(store.folder.glob(".tmp-*"))


def test_two_processes_fill_one_store(tmp_path):
    """Each has rows of its own and rows that the other scores too; the first to write those wins, the same for all who read."""
    with writer(tmp_path, 0, 3000, 30) as one, writer(tmp_path, 1500, 3000, 30, shift=0.5) as two:
        go(one), go(two)
        assert len(one.stdout.read().splitlines()) == len(two.stdout.read().splitlines()) == 100
        assert one.wait() == two.wait() == 0
    store = opened(tmp_path)
    assert_holds(store, 0, 1500)
    keys, logps, _ = rows(0, 4500)
    got = store.lookup(keys)
    assert got.found_N.all()
    shift = (logps - got.logps_N2)[:, 0]
    assert set(shift[:1500]) == {0.0} and set(shift[3000:]) == {0.5} and set(shift[1500:3000]) <= {0.0, 0.5}
    np.testing.assert_array_equal(opened(tmp_path).lookup(keys).logps_N2, got.logps_N2)
    (entry,) = list_cache(tmp_path)
    assert (entry.rows, entry.parts, entry.problems) == (4500, 200, [])


def test_many_processes_describe_one_reference_at_once(tmp_path):
    """prepare_to_write from eight processes at the same time: one description, no error, nothing left over."""
    ready, waits = "store.prepare_to_write()\n", "sys.stdin.readline()\n"
    script = WRITER.replace(ready, "").replace(waits, waits + ready)
    assert script.index(waits) < script.index(ready)
    command = [sys.executable, "-c", script, str(tmp_path), "0", "0", "1", "0"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        go(process)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["reference.json"]
    assert json.loads((folder / "reference.json").read_text())["parts"] == IDENTITY.parts


@pytest.fixture
def small_disk():
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        lacking("mounting a small disk takes root")
    with tempfile.TemporaryDirectory() as folder:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "mrpo-test", folder], capture_output=True, text=True, check=False
        )
        if mount.returncode:
            lacking(f"no small disk: {mount.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_the_writer_and_not_the_readers(small_disk):
    root = small_disk / "cache"
    store = new_store(root)
    with pytest.raises(TrainingError, match=r"No space left on device.*readable as it was.*Make room") as caught:  # noqa: SIM117
        with PartWriter(store, rows=3000) as parts:
            for at in range(0, 10**6, 100):
                parts.add(*rows(at, at + 100))
    assert str(store.folder) in str(caught.value)
    written = len(opened(root))
    assert written > 10_000 and written % 3000 == 0
    assert_holds(opened(root), 0, written)
    assert_holds(store, 0, written)
    assert all(report.problem is None for report in store.verify()) and not list(store.folder.glob(".tmp-*"))

    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(512))
    with pytest.raises(ConfigError, match=r"`ref_cache_dir`.*No space left on device.*name another folder"):
        new_store(root)
    assert_holds(opened(root), 0, written)
    filler.unlink()
    store.write_part(*rows(written, written + 100))  # and after room was made it goes on
    assert_holds(opened(root), 0, written + 100)


def test_a_read_only_disk(small_disk):
    root = small_disk / "cache"
    new_store(root).write_part(*rows(0, 10))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for place in (root, small_disk / "another"):
        with pytest.raises(ConfigError, match=r"`ref_cache_dir`.*Read-only file system"):
            new_store(place)
    store = opened(root)
    assert_holds(store, 0, 10)
    with pytest.raises(TrainingError, match="Read-only"):
        store.write_part(*rows(10, 20))


LIMITED = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from tests.scored_rows import IDENTITY, rows
from mrpo_scale.base.errors import TrainingError
from mrpo_scale.references.store.cache import ReferenceStore
store = ReferenceStore(Path(sys.argv[1]), IDENTITY)
store.prepare_to_write()
store.write_part(*rows(0, 1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
try:
    store.write_part(*rows(1000, 9000))
except TrainingError as error:
    print(error)
print(sorted(path.name[:5] for path in store.folder.iterdir()))
store.write_part(*rows(1000, 2000))
"""


def test_a_limit_on_file_sizes_is_a_clear_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error, files = done.stdout.splitlines()
    assert "File too large" in error and str(tmp_path) in error and "8000 rows" in error
    assert files == "['part-', 'refer']"
    assert_holds(opened(tmp_path), 0, 2000)
    assert len(opened(tmp_path)) == 2000


def test_a_cache_directory_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match=r"`ref_cache_dir`.*Not a directory"):
        new_store(tmp_path / "cache")
