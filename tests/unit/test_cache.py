"""The store of scored rows: whatever happens to files and processes, it gives the written scores or an error."""

import hashlib
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

from mrpo_scale.errors import ConfigError, TrainingError
from mrpo_scale.references import cache, parts
from mrpo_scale.references.cache import PartWriter, ReferenceStore, list_cache
from mrpo_scale.references.identity import ReferenceIdentity

PARTS = {
    "weights": {"model.safetensors": "ab" * 32},
    "config": "cd" * 32,
    "text": "ef" * 32,
    "dtype": "float32",
    "scoring": 1,
}
IDENTITY = ReferenceIdentity("calm", PARTS, "models/calm")


def keys(start, stop):
    """Keys in no order. Every 16th ends in a zero byte and every 256th in two, which numpy strips from single elements."""
    digests = [hashlib.sha256(i.to_bytes(8, "little")).digest() for i in range(start, stop)]
    raw = [d[:15] + bytes([i % 16]) if i % 256 else d[:14] + b"\0\0" for i, d in enumerate(digests, start)]
    return np.frombuffer(b"".join(raw), dtype="S16")


def scores(start, stop, shift=0.0):
    """Log-probs and token counts that name their row; ``shift`` tells writers apart."""
    i = np.arange(start, stop)
    logps = -np.stack([1 + i + shift, 2 + 2 * i + shift], axis=1).astype(np.float32)
    return logps, np.stack([1 + i % 7, 2 + i % 5], axis=1).astype(np.int32)


def rows(start, stop, shift=0.0):
    return keys(start, stop), *scores(start, stop, shift)


def new_store(root, wanted=None):
    store = ReferenceStore(root, IDENTITY, wanted)
    store.prepare_to_write()
    return store


def opened(root, identity=IDENTITY):
    store = ReferenceStore(root, identity)
    store.refresh()
    return store


def assert_holds(store, start, stop, shift=0.0):
    got, (logps, tokens) = store.lookup(keys(start, stop)), scores(start, stop, shift)
    assert got.found_N.all()
    np.testing.assert_array_equal(got.logps_N2, logps)
    np.testing.assert_array_equal(got.tokens_N2, tokens)


def write_raw_part(folder, tensors, metadata, name="part-0000000000000001-00000000.safetensors"):
    """A file with a checksum that is right, whatever is in it."""
    data = bytearray(safetensors.numpy.save(tensors, metadata={**metadata, "sha256": "0" * 64}))
    at = data.index(b"0" * 64)
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    (folder / name).write_bytes(data)
    return folder / name


# --- what is written is read


def test_rows_come_back_bit_for_bit_in_any_order(tmp_path):
    store = new_store(tmp_path)
    path = store.write_part(*rows(0, 1000))
    assert path.parent == tmp_path / IDENTITY.key
    for s in (store, opened(tmp_path)):
        assert_holds(s, 0, 1000)
        asked = np.concatenate([keys(990, 1010), keys(5, 6), keys(5, 6)])
        got = s.lookup(asked)
        assert got.found_N.tolist() == [True] * 10 + [False] * 10 + [True] * 2
        assert np.isnan(got.logps_N2[10:20]).all() and not got.tokens_N2[10:20].any()
        assert got.logps_N2.dtype == np.float32 and got.tokens_N2.dtype == np.int32
        np.testing.assert_array_equal(got.logps_N2[20:], np.repeat(scores(5, 6)[0], 2, axis=0))
        np.testing.assert_array_equal(s.missing(asked), ~got.found_N)


def test_a_part_is_a_plain_safetensors_file(tmp_path):
    path = new_store(tmp_path).write_part(*rows(0, 10))
    tensors = safetensors.numpy.load_file(path)
    order = np.argsort(keys(0, 10))
    np.testing.assert_array_equal(tensors["logps"], scores(0, 10)[0][order])
    assert tensors["row_key"].shape == (10, 16) and tensors["row_key"].dtype == np.uint8
    assert tensors["row_key"].tobytes() == keys(0, 10)[order].tobytes()


def test_an_empty_or_absent_store_has_nothing(tmp_path):
    store = ReferenceStore(tmp_path / "not there", IDENTITY)
    assert store.refresh() == 0 and store.missing(keys(0, 3)).all() and store.verify() == []
    assert store.lookup(keys(0, 0)).logps_N2.shape == (0, 2)
    assert not (tmp_path / "not there").exists()


def test_refresh_reads_what_others_wrote_since(tmp_path):
    mine, other = new_store(tmp_path), new_store(tmp_path)
    other.write_part(*rows(0, 10))
    mine.write_part(*rows(10, 20))
    assert mine.refresh() == 10 and mine.refresh() == 0
    assert_holds(mine, 0, 20)
    other.write_part(*rows(15, 25))  # five of them known
    assert mine.refresh() == 5 and len(mine) == 25


def test_many_parts_are_merged_as_they_come_and_none_is_read_twice(tmp_path, monkeypatch):
    writer, reader = new_store(tmp_path), ReferenceStore(tmp_path, IDENTITY)
    reads = []
    real = parts.read_part
    monkeypatch.setattr(cache, "read_part", lambda path, key: (reads.append(path), real(path, key))[1])
    merged = 0
    for i in range(64):
        writer.write_part(*rows(i * 8, i * 8 + 8))
        assert reader.refresh() == 8
        merged += len(reader._runs[-1].keys_N)
    assert_holds(reader, 0, 512)
    assert_holds(writer, 0, 512)
    assert len(reads) == len(set(reads)) == 64
    # Merging all rows with every part would touch 64 * 65 / 2 * 8 rows; doubling runs touch each row log2(64) + 1 times at most.
    assert merged <= 512 * 7 and len(reader._runs) <= 7


def test_keys_that_end_in_zero_bytes_stay_apart(tmp_path):
    raw = [b"\0" * 16, b"a" + b"\0" * 15, b"a" * 15 + b"\0", b"a" * 16, b"\0" * 15 + b"a"]
    these = np.frombuffer(b"".join(raw), dtype="S16")
    new_store(tmp_path).write_part(these, *scores(0, 5))
    np.testing.assert_array_equal(opened(tmp_path).lookup(these).logps_N2, scores(0, 5)[0])


def test_a_row_given_twice_is_written_once_the_first_of_them(tmp_path):
    store = new_store(tmp_path)
    both = [np.concatenate(pair) for pair in zip(rows(0, 4), rows(0, 4, shift=0.5), strict=True)]
    store.write_part(*both)
    assert_holds(store, 0, 4)
    assert len(opened(tmp_path)) == 4
    assert_holds(opened(tmp_path), 0, 4)


def test_only_wanted_rows_are_kept_in_memory(tmp_path):
    new_store(tmp_path).write_part(*rows(0, 100))
    store = new_store(tmp_path, wanted=np.concatenate([keys(40, 60), keys(200, 210), keys(40, 41)]))
    assert store.refresh() == 20 and len(store) == 20
    assert_holds(store, 40, 60)
    assert store.missing(keys(0, 40)).all()
    store.write_part(*rows(195, 205))
    assert len(store) == 25 and store.missing(keys(195, 200)).all()
    assert_holds(store, 200, 205)
    assert len(opened(tmp_path)) == 110  # on disk nothing is lost


def test_wrong_arrays_are_refused_before_anything_is_written(tmp_path):
    store = new_store(tmp_path)
    k, logps, tokens = rows(0, 4)
    for bad in (
        (k.astype("S20"), logps, tokens),
        (k.astype("S12"), logps, tokens),
        (k, logps[:3], tokens),
        (k, logps, tokens.astype(np.float32)),
        (k[:0], logps[:0], tokens[:0]),
    ):
        with pytest.raises(ValueError):
            store.write_part(*bad)
    for value in (np.nan, np.inf, -np.inf, 3.0):
        wrong = logps.copy()
        wrong[2, 1] = value
        with pytest.raises(TrainingError, match="1 of 4 rows"):
            store.write_part(k, wrong, tokens)
    with pytest.raises(TrainingError, match="no tokens"):
        store.write_part(k, logps, np.zeros_like(tokens))
    assert [p.name for p in store.folder.iterdir()] == ["reference.json"] and store.missing(k).all()
    # Rounding may lift the log-prob of a certain token above 0 by an ulp of its logit.
    store.write_part(k, np.full((4, 2), 7.6e-6, np.float32), tokens)
    assert len(opened(tmp_path)) == 4


# --- the oldest part wins


def test_the_oldest_part_wins_in_every_process_and_stays_the_winner(tmp_path):
    first, second = new_store(tmp_path), new_store(tmp_path)
    first.write_part(*rows(0, 10))
    second.write_part(*rows(5, 15, shift=0.5))
    for _ in range(3):
        resumed = opened(tmp_path)
        assert_holds(resumed, 0, 10)
        assert_holds(resumed, 10, 15, shift=0.5)
        first.refresh()
        assert_holds(first, 0, 10)
        new_store(tmp_path).write_part(*rows(0, 20, shift=0.25))


def test_a_machine_whose_clock_is_late_still_writes_newer_parts(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    store.write_part(*rows(0, 10))
    monkeypatch.setattr(parts.time, "time_ns", lambda: 10**18)  # the year 2001
    late = new_store(tmp_path)
    names = [late.write_part(*rows(0, 10, shift=i)).name for i in (0.25, 0.5)]
    assert sorted(names) == names == parts.part_names(store.folder)[1:]
    assert_holds(opened(tmp_path), 0, 10)


# --- damage


def test_every_one_of_200_corrupted_bytes_is_found_and_named(tmp_path):
    store = new_store(tmp_path)
    paths = [
        store.write_part(*rows(i * 50, i * 50 + 50 - i)) for i in range(4)
    ]  # odd sizes: headers with and without padding
    rng = random.Random(0)
    header = 8 + int.from_bytes(paths[0].read_bytes()[:8], "little")
    regions = {"length": range(8), "header": range(8, header), "data": range(header, paths[3].stat().st_size)}
    seen = set()
    for _ in range(200):
        path = rng.choice(paths)
        # Most bytes are data, so the regions get fixed shares; one bit or any other byte.
        at = rng.choice(regions[rng.choice(["length", *["header"] * 5, *["data"] * 6])])
        seen.add(at)
        good = path.read_bytes()
        change = rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        path.write_bytes(good[:at] + bytes([good[at] ^ change]) + good[at + 1 :])
        fresh = ReferenceStore(tmp_path, IDENTITY)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            fresh.refresh()
        assert fresh.missing(keys(0, 200)).all(), f"rows of a damaged cache were used (byte {at}, change {change})"
        assert [r.name for r in fresh.verify() if r.problem] == [path.name]
        path.write_bytes(good)
    assert len(seen) > 100
    assert len(opened(tmp_path)) == 200 - 6


def test_every_byte_of_a_small_part_counts(tmp_path):
    path = new_store(tmp_path).write_part(*rows(0, 2))
    good = path.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x20  # turns the case of the digits of the checksum too, and spaces of the padding into zero bytes
        path.write_bytes(bad)
        with pytest.raises(parts.PartError):
            parts.read_part(path, IDENTITY.key)
    path.write_bytes(good)
    assert len(parts.read_part(path, IDENTITY.key).keys_N) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "has 0 bytes"),
        (lambda data: data[:5], "has 5 bytes"),
        (lambda data: data[:200], "header"),
        (lambda data: data[:-1], "sha256"),
        (lambda data: data + b"\0", "sha256"),
        (lambda data: (1 << 60).to_bytes(8, "little") + data[8:], "header has 1152921504606846976 bytes"),
        (lambda data: bytes(8) + data[8:], "header has 0 bytes"),
        (lambda data: b"\xff" * len(data), "header"),
        (lambda data: b"PK" + data, "header"),
    ],
)
def test_files_that_are_no_whole_part(tmp_path, change, says):
    path = new_store(tmp_path).write_part(*rows(0, 20))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=says) as caught:
        opened(tmp_path)
    assert str(path) in str(caught.value) and "delete the file" in str(caught.value)


GOOD = {
    "row_key": np.frombuffer(np.sort(keys(0, 3)).tobytes(), np.uint8).reshape(3, 16),
    "logps": scores(0, 3)[0],
    "tokens": scores(0, 3)[1],
}
METADATA = {"format": "1", "reference": IDENTITY.key}


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({}, {"format": "2"}, "format '2'.*update mrpo_scale"),
        ({}, {"reference": "0" * 32}, "written for the reference 0{32}"),
        ({"logps": GOOD["logps"].astype(np.float64)}, {}, "float32"),
        ({"logps": GOOD["logps"][:2]}, {}, "n, 2"),
        ({"row_key": GOOD["row_key"][:, :8].copy()}, {}, "row_key"),
        ({"tokens": GOOD["tokens"].astype(np.int64)}, {}, "int32"),
        ({"more": GOOD["tokens"]}, {}, "more"),
        ({name: value[:0] for name, value in GOOD.items()}, {}, "row_key"),
        ({"logps": np.full((3, 2), np.nan, np.float32)}, {}, "3 rows with log-probs"),
        ({"logps": np.full((3, 2), 1.0, np.float32)}, {}, "above 0"),
        ({"tokens": np.zeros((3, 2), np.int32)}, {}, "without tokens"),
        ({"row_key": GOOD["row_key"][::-1].copy()}, {}, "order"),
        ({"row_key": GOOD["row_key"][[0, 0, 1]]}, {}, "order"),
    ],
)
def test_parts_with_a_right_checksum_and_a_wrong_content(tmp_path, tensors, metadata, says):
    store = new_store(tmp_path)
    path = write_raw_part(store.folder, GOOD, METADATA)
    assert opened(tmp_path).refresh() == 0 and len(opened(tmp_path)) == 3  # the same file without the fault is read
    path.unlink()
    write_raw_part(store.folder, {**GOOD, **tensors}, {**METADATA, **metadata})
    with pytest.raises(ConfigError, match=says) as caught:
        opened(tmp_path)
    assert path.name in str(caught.value)
    assert len(store.verify()) == 1 and re.search(says, store.verify()[0].problem)


def test_a_part_of_another_reference_is_not_read(tmp_path):
    other = ReferenceIdentity("other", {**PARTS, "dtype": "bfloat16"})
    assert other.key != IDENTITY.key
    theirs = ReferenceStore(tmp_path, other)
    theirs.prepare_to_write()
    path = theirs.write_part(*rows(0, 5))
    shutil.copy(path, new_store(tmp_path).folder)
    with pytest.raises(ConfigError, match=f"written for the reference {other.key}"):
        opened(tmp_path)


def test_links_and_other_things_in_place_of_a_part(tmp_path):
    store = new_store(tmp_path)
    path = store.write_part(*rows(0, 5))
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a link"):
        opened(tmp_path)
    path.unlink()
    os.mkfifo(path)  # which would block whoever opens it
    with pytest.raises(ConfigError, match="no plain file"):
        opened(tmp_path)


def test_names_that_are_no_parts_are_not_read_and_verify_says_so(tmp_path):
    store = new_store(tmp_path)
    path = store.write_part(*rows(0, 5))
    shutil.copy(path, store.folder / "part-1 (copy).safetensors")
    (store.folder / ".tmp-1-2").write_bytes(b"half a part")
    (store.folder / "notes.txt").write_text("mine")
    assert len(opened(tmp_path)) == 5
    assert [(r.name, r.rows) for r in store.verify() if r.problem] == [("part-1 (copy).safetensors", 0)]


def test_a_bad_part_spoils_nothing_that_is_in_memory_and_leaves_when_deleted(tmp_path):
    store, other = new_store(tmp_path), new_store(tmp_path)
    store.write_part(*rows(0, 5))
    good, bad = other.write_part(*rows(5, 10)), other.write_part(*rows(10, 15))
    bad.write_bytes(bad.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(ConfigError, match=bad.name):
            store.refresh()
        assert_holds(store, 0, 5)
        assert store.missing(keys(5, 15)).all()
    reports = {r.name: r for r in store.verify()}
    assert reports[good.name].rows == 5 and reports[good.name].problem is None
    assert reports[good.name].bytes == good.stat().st_size
    assert "sha256" in reports[bad.name].problem and reports[bad.name].rows == 0
    bad.unlink()
    assert store.refresh() == 5
    assert_holds(store, 0, 10)


# --- reference.json


def test_reference_json_says_what_the_key_is_made_of(tmp_path):
    store = new_store(tmp_path)
    description = json.loads((store.folder / "reference.json").read_text())
    assert description["parts"] == PARTS and description["key"] == IDENTITY.key == store.folder.name
    assert description["name"] == "calm" and description["path"] == "models/calm"
    before = (store.folder / "reference.json").read_bytes()
    ReferenceStore(tmp_path, ReferenceIdentity("renamed", PARTS, "moved")).prepare_to_write()
    assert (store.folder / "reference.json").read_bytes() == before


def test_reference_json_of_another_reference_or_damaged(tmp_path):
    store = new_store(tmp_path)
    store.write_part(*rows(0, 5))
    path = store.folder / "reference.json"
    whole = json.loads(path.read_text())
    for content, says in [
        (json.dumps({**whole, "parts": {**PARTS, "dtype": "bfloat16"}}), "describes another reference"),
        (path.read_text()[:-20], "is not JSON"),
        ("[]", "does not describe"),
        ("\xff", "is not JSON"),
    ]:
        path.write_bytes(content.encode("latin-1"))
        for act in (lambda: opened(tmp_path), lambda: new_store(tmp_path)):
            with pytest.raises(ConfigError, match=says):
                act()
    path.unlink()
    assert len(opened(tmp_path)) == 5  # parts name their reference themselves
    new_store(tmp_path)
    assert json.loads(path.read_text())["parts"] == PARTS


# --- listing


def test_list_cache(tmp_path):
    assert list_cache(tmp_path / "not there") == []
    store = new_store(tmp_path)
    store.write_part(*rows(0, 10))
    bad = store.write_part(*rows(5, 15))
    other = ReferenceStore(tmp_path, ReferenceIdentity("other", {**PARTS, "dtype": "bfloat16"}))
    other.prepare_to_write()
    (tmp_path / "file_hashes").mkdir()  # the memo of identify() may lie here
    entries = {entry.key: entry for entry in list_cache(tmp_path)}
    assert entries.keys() == {IDENTITY.key, other.identity.key}
    entry = entries[IDENTITY.key]
    assert (entry.rows, entry.parts, entry.problems) == (15, 2, []) and entry.description["name"] == "calm"
    assert entry.bytes == sum(p.stat().st_size for p in store.folder.glob("part-*"))
    assert entries[other.identity.key].rows == 0
    bad.write_bytes(b"")
    (store.folder / "reference.json").unlink()
    entry = next(e for e in list_cache(tmp_path) if e.key == IDENTITY.key)
    assert entry.rows == 10 and entry.description == {}
    assert any(bad.name in p for p in entry.problems) and any("reference.json is missing" in p for p in entry.problems)


# --- PartWriter


def part_sizes(store):
    return [report.rows for report in store.verify()]


def test_part_writer_writes_at_its_limit_and_the_rest_on_exit(tmp_path):
    store = new_store(tmp_path)
    with PartWriter(store, rows=10) as writer:
        for start in range(0, 27, 3):
            writer.add(*rows(start, start + 3))
        assert part_sizes(store) == [12, 12]  # all that wait, so that one part at most is in memory only
        writer.add(*rows(27, 50))
        assert part_sizes(store) == [12, 12, 26]
        writer.add(*rows(50, 52))
        writer.add(*rows(0, 0))
    assert part_sizes(store) == [12, 12, 26, 2]
    assert_holds(opened(tmp_path), 0, 52)
    assert_holds(store, 0, 52)


def test_part_writer_keeps_copies(tmp_path):
    store = new_store(tmp_path)
    k, logps, tokens = rows(0, 3)
    with PartWriter(store) as writer:
        writer.add(k, logps, tokens)
        logps[:], tokens[:] = -99, 99
    assert_holds(store, 0, 3)


def test_part_writer_writes_after_its_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])
    store = new_store(tmp_path)
    with PartWriter(store, seconds=300) as writer:
        writer.add(*rows(0, 2))
        now[0] += 299
        writer.add(*rows(2, 4))
        assert part_sizes(store) == []
        now[0] += 1
        writer.add(*rows(4, 6))
        assert part_sizes(store) == [6]
        now[0] += 299  # the time runs from the first row that waits, not from the last part
        writer.add(*rows(6, 8))
        now[0] += 299
        writer.add(*rows(8, 9))
        assert part_sizes(store) == [6]
        writer.flush()
        assert part_sizes(store) == [6, 3]
        writer.flush()
    assert part_sizes(store) == [6, 3]


def test_part_writer_writes_what_it_has_when_the_run_fails(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(KeyboardInterrupt), PartWriter(store) as writer:
        writer.add(*rows(0, 5))
        raise KeyboardInterrupt
    assert_holds(opened(tmp_path), 0, 5)


def test_part_writer_does_not_hide_why_the_run_failed(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory") as caught, PartWriter(store) as writer:
        writer.add(*rows(0, 5))
        shutil.rmtree(store.folder)
        raise RuntimeError("out of memory")
    assert any("could not be stored" in note for note in caught.value.__notes__)
    with pytest.raises(TrainingError, match="No such file"), PartWriter(store) as writer:
        writer.add(*rows(0, 5))
