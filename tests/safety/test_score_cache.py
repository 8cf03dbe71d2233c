"""Hostile score caches: paths in metadata, links out, what is no file, absurd headers; through the commands that read one."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy

from mrpo_scale.cli import run_command
from tests.safety.hostile import Place, bounded, tensors

HOLE = "0" * 64


@pytest.fixture(scope="module")
def scored(tmp_path_factory, models):
    """A cache that `mrpo score` has filled."""
    root = tmp_path_factory.mktemp("scored")
    place = Place(root, models, None)
    with bounded():
        run_command("score", place.words(ref_cache_dir=root / "cache"))
    return root / "cache"


@pytest.fixture
def cache(place, scored):
    shutil.copytree(scored, place.root / "cache")
    return place.root / "cache"


def a_reference(cache):
    """The folder of one reference."""
    return sorted(folder for folder in cache.iterdir() if (folder / "reference.json").is_file())[0]


def a_part(folder):
    return next(folder.glob("part-*.safetensors"))


def signed(header, data=b""):
    """A part whose checksum is right, whatever its header says."""
    text = header.replace(b"SHA", HOLE.encode())
    whole = bytearray(tensors(text, data))
    at = whole.index(HOLE.encode())
    whole[at : at + 64] = hashlib.sha256(whole).hexdigest().encode()
    return bytes(whole)


def metadata(**change):
    def spoil(folder, place):
        held = safetensors.numpy.load_file(a_part(folder))
        known = {"format": "1", "reference": folder.name, "sha256": HOLE}
        data = bytearray(safetensors.numpy.save(held, metadata={**known, **change}))
        at = data.index(HOLE.encode())
        data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
        a_part(folder).write_bytes(data)

    return spoil


def part(entries, data=b""):
    """Entries of a header, raw JSON."""

    def spoil(folder, place):
        known = b'{"__metadata__":{"format":"1","reference":"%s","sha256":"SHA"}' % folder.name.encode()
        a_part(folder).write_bytes(signed(known + entries + b"}", data))

    return spoil


def table(shape, data=128, **offsets):
    """A part of three tensors of ``shape`` rows, at these places among ``data`` bytes; sound ones for ``table(4)``."""
    places = {"row_key": [0, 64], "logps": [64, 96], "tokens": [96, 128], **offsets}
    types = {"row_key": ("U8", 16), "logps": ("F32", 2), "tokens": ("I32", 2)}
    entries = {
        name: {"dtype": dtype, "shape": [shape, width], "data_offsets": places[name]}
        for name, (dtype, width) in types.items()
    }
    return part(b"," + json.dumps(entries).encode()[1:-1], bytes(data))


def values(**change):
    def spoil(folder, place):
        held = {**safetensors.numpy.load_file(a_part(folder)), **change}
        data = bytearray(
            safetensors.numpy.save(held, metadata={"format": "1", "reference": folder.name, "sha256": HOLE})
        )
        at = data.index(HOLE.encode())
        data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
        a_part(folder).write_bytes(data)

    return spoil


def raw(change):
    return lambda folder, place: a_part(folder).write_bytes(change(a_part(folder).read_bytes()))


def linked_part(folder, place):
    file = a_part(folder)
    file.rename(place.root / "outside")
    file.symlink_to(place.root / "outside")


def fifo_part(folder, place):
    file = a_part(folder)
    file.unlink()
    os.mkfifo(file)


def device_part(folder, place):
    file = a_part(folder)
    file.unlink()
    file.symlink_to("/dev/zero")


def linked_folder(folder, place):
    folder.rename(place.root / "outside")
    folder.symlink_to(place.root / "outside")


def description(content):
    return lambda folder, place: (folder / "reference.json").write_text(content)


def another_key(folder, place):
    file = folder / "reference.json"
    told = json.loads(file.read_text())
    told["parts"]["weights"] = {"../../model.safetensors": "0" * 64}
    file.write_text(json.dumps(told))


def fifo_description(folder, place):
    (folder / "reference.json").unlink()
    os.mkfifo(folder / "reference.json")


def linked_description(folder, place):
    (folder / "reference.json").unlink()
    (folder / "reference.json").symlink_to("/dev/zero")


NAN = np.full((20, 2), np.nan, np.float32)
CASES = {
    "a path in the metadata": (metadata(reference="../../../etc"), ["written for the reference ../../../etc"]),
    "a root in the metadata": (metadata(reference="/etc"), ["written for the reference /etc"]),
    "an escape sequence in the metadata": (metadata(format="\x1b[2J"), ["of format", "delete the file"]),
    "a part that is a link": (linked_part, ["is a link or no plain file"]),
    "a part that is a device": (device_part, ["is a link or no plain file"]),
    "a part that is a FIFO": (fifo_part, ["is a link or no plain file"]),
    "a reference that is a link": (linked_folder, ["is a link to", "out of the cache"]),
    "a header of 2^60 bytes": (raw(lambda b: (1 << 60).to_bytes(8, "little") + b[8:]), ["1152921504606846976 bytes"]),
    "a header of 1 MB": (raw(lambda b: tensors(b'{"a":"' + b"x" * (1 << 20) + b'"}')), ["says that its header has"]),
    "a header of brackets": (raw(lambda b: tensors(b'{"a":' + b"[" * 60_000)), ["header that is not a part's"]),
    "brackets under a right checksum": (
        part(b',"a":' + b"[" * 30_000 + b"]" * 30_000),
        ["header that is not a part's"],
    ),
    "entries that are no tensors": (part(b',"row_key":5,"logps":[],"tokens":"x"'), ["not row_key"]),
    "a shape that is no list": (part(b',"row_key":{"dtype":"U8","shape":7}'), ["not row_key"]),
    "a negative shape": (table(-4), ["not a safetensors file"]),
    "a shape that overflows": (table(1 << 62), ["not a safetensors file", "overflow"]),
    "tensors that overlap": (table(4, 64, logps=[0, 32], tokens=[32, 64]), ["not a safetensors file"]),
    "a tensor beyond the file": (table(4, 100), ["not a safetensors file"]),
    "a name given twice": (
        part(
            b',"logps":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"logps":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}',
            bytes(16),
        ),
        ["part-", "not row_key"],
    ),
    "scores that are no numbers": (values(logps=NAN), ["not finite"]),
    "scores above zero": (values(logps=-NAN * 0 + 1), ["above 0"]),
    "a description of brackets": (description("[" * 100_000), ["reference.json", "nested too deep"]),
    "a description that is no JSON": (description("no"), ["reference.json", "not JSON"]),
    "a description of 5 MB": (
        description('{"parts": {"a": "' + "x" * (5 << 20) + '"}}'),
        ["reference.json", "more than"],
    ),
    "a description of another key": (another_key, ["describes another reference"]),
    "a description that is a FIFO": (fifo_description, ["reference.json", "no plain file"]),
    "a description that is a link": (linked_description, ["reference.json", "is a link"]),
}


@pytest.mark.parametrize(
    ("command", "case"),
    [("train", case) for case in CASES]
    + [(command, case) for command in ("score", "inspect") for case in CASES if case.startswith("a reference")]
    + [("score", "a part that is a FIFO"), ("inspect", "brackets under a right checksum")],
    ids=lambda name: name.replace(" ", "-"),
)
def test_caches(command, case, place, cache):
    spoil, says = CASES[case]
    spoil(a_reference(cache), place)
    error = place.refused(command, place.words(ref_cache_dir=cache), "ref_cache_dir", *says)
    assert "\x1b" not in error


def test_the_listing_reads_no_link_and_obeys_no_escape(place, cache, capsys):
    """Folders of references that the recipe does not have are listed, with the names that their files give."""
    stranger = cache / ("a" * 32)
    stranger.mkdir()
    (stranger / "reference.json").write_text(json.dumps({"name": "\x1b[2Jevil", "parts": {}}))
    (cache / ("b" * 32)).symlink_to(place.root)
    with bounded():
        run_command("score", [*place.words(ref_cache_dir=cache), "--list"])
    printed = capsys.readouterr().out
    assert "\\x1b[2Jevil" in printed and "\x1b" not in printed and "is a link to" in printed


def test_a_cache_on_another_disk_may_be_a_link(place, cache):
    (place.root / "link").symlink_to(cache)
    with bounded():
        run_command("score", place.words(ref_cache_dir=place.root / "link"))


def test_a_memo_of_hashes_that_is_no_file(place, cache):
    """`file_hashes` spares reading weights again; one that is not what we wrote is not used, and does not block."""
    for memo in (cache / "file_hashes").iterdir():
        memo.unlink()
        os.mkfifo(memo)
    with bounded():
        run_command("score", place.words(ref_cache_dir=cache))
