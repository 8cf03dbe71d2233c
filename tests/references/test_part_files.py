"""A part is right byte for byte, or an error that names it."""

import hashlib
import os
import random
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.references.store import part_files as parts
from mrpo_scale.references.store.cache import ReferenceStore
from mrpo_scale.references.store.identity import ReferenceIdentity
from tests.scored_rows import IDENTITY, PARTS, assert_holds, keys, new_store, opened, rows, scores


def write_raw_part(folder, tensors, metadata, name="part-0000000000000001-00000000.safetensors"):
    """A file with a checksum that is right, whatever is in it."""
    data = bytearray(safetensors.numpy.save(tensors, metadata={**metadata, "sha256": "0" * 64}))
    at = data.index(b"0" * 64)
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    (folder / name).write_bytes(data)
    return folder / name


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


def test_a_newer_format_is_named_even_if_nothing_else_of_it_is_known(tmp_path):
    data = safetensors.numpy.save({"all": np.zeros(3)}, metadata={"format": "2"})
    path = new_store(tmp_path).folder / "part-0000000000000001-00000000.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{path.name} is of format '2'.*update mrpo_scale"):
        opened(tmp_path)


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
