"""The store of scored rows: what was written is read, bit for bit, and the oldest of two scores counts."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from mrpo_scale.base.errors import ConfigError, TrainingError
from mrpo_scale.references.store import cache
from mrpo_scale.references.store import part_files as parts
from mrpo_scale.references.store.cache import PartWriter, ReferenceStore, list_cache
from mrpo_scale.references.store.identity import ReferenceIdentity
from tests.scored_rows import IDENTITY, PARTS, assert_holds, keys, new_store, opened, rows, scores

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
    for start in range(300, 320):
        store.write_part(*rows(start, start + 1))
    assert len(store) == 25 and len(store._runs) <= 2  # and parts without a wanted row cost no lookup anything


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
        ("\xff", "is not UTF-8"),
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
