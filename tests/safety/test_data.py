"""Hostile data: scripts, pickles, files elsewhere, archives under another name, rows of any size."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile

import datasets
import pytest

from mrpo_scale.cli import run_command
from tests.safety.hostile import Trap, bounded, json_lines
from tests.tiny import pair_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` unpacks and converts into a folder of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


ROWS = json_lines(pair_rows(20))


def script(place):
    return place.trap("set/set.py").parent


def loose_script(place):
    return place.trap("evil.py")


def pickled(place):
    return place.write("rows.json", pickle.dumps(Trap(place.executed)))


def readme(text):
    def make(place):
        place.write("secret.jsonl", ROWS)
        return place.write("set/README.md", f"---\n{text(place)}\n---\n").parent

    return make


def files(where):
    return readme(lambda place: f"configs:\n- config_name: default\n  data_files: {where(place)}")


def zipped(place):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.json", ROWS + " " * (100 << 20))
    return place.write("rows.json", data.getvalue())


def tarred(place):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        member = tarfile.TarInfo("../../rows.json")
        member.size = len(ROWS)
        archive.addfile(member, io.BytesIO(ROWS.encode()))
    return place.write("rows.jsonl", data.getvalue())


def fifo(place):
    os.mkfifo(place.root / "rows.jsonl")
    return place.root / "rows.jsonl"


def saved(state):
    def make(place):
        place.write("set/dataset_info.json", "{}")
        return place.write("set/state.json", json.dumps(state)).parent

    return make


STATE = {
    "_data_files": [{"filename": "../../rows.arrow"}],
    **dict.fromkeys(("_fingerprint", "_format_columns", "_format_type", "_split")),
    "_format_kwargs": {},
    "_output_all_columns": False,
}
CASES = {
    "a loading script": (script, ["cannot be read", "scripts are no longer supported"]),
    "a Python file": (loose_script, ["evil.py", "not one of .json"]),
    "a pickle called json": (pickled, ["rows.json", "cannot be read"]),
    "a zip called json": (zipped, ["rows.json", "is a zip archive"]),
    "a gzip called jsonl": (lambda p: p.write("rows.jsonl", gzip.compress(ROWS.encode())), ["is a gzip archive"]),
    "a tar called jsonl": (tarred, ["is a tar archive"]),
    "a FIFO": (fifo, ["rows.jsonl", "cannot be read"]),
    "a README that climbs": (
        files(lambda p: "../secret.jsonl"),
        ["README.md names", "secret.jsonl", "not in the folder"],
    ),
    "a README with a root": (files(lambda p: f"{p.root}/secret.jsonl"), ["README.md names", "not in the folder"]),
    "a README with Python": (
        readme(lambda p: f"configs: !!python/object/apply:os.system ['touch {p.executed}']"),
        ["cannot be read"],
    ),
    "a saved set that climbs": (saved(STATE), ["cannot be read"]),
    "a saved set that is a list": (saved([]), ["cannot be read"]),
    "Arrow that is none": (lambda p: p.write("rows.arrow", b"ARROW1" + b"\xff" * 99), ["cannot be read"]),
    "Parquet that is none": (lambda p: p.write("rows.parquet", b"PAR1" + b"\xff" * 99 + b"PAR1"), ["cannot be read"]),
}


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_data(case, place):
    make, says = CASES[case]
    place.refused("train", place.words(dataset_name=make(place)), "dataset_name", *says)


def bad_rows(place, rows, more=""):
    """What scoring these rows leaves out: [(row, reason)]."""
    data = place.write("rows.jsonl", json_lines(rows) + more)
    with bounded():
        run_command("score", place.words(dataset_name=data, max_bad_rows=0.5, ref_cache_dir=place.root / "cache"))
    listed = [json.loads(line) for file in place.run.glob("bad_rows_*.jsonl") for line in file.read_text().splitlines()]
    return [(row["row"], row["reason"]) for row in listed]


def test_a_row_of_any_length_leaves_for_all_models(place):
    """200 MB took more than 45 s to tokenize, of which 1,024 tokens were kept; here 32 MB."""
    rows = pair_rows(20)
    rows[3]["chosen"][0]["content"] = "one two " * (4 << 20)
    assert bad_rows(place, rows) == [(3, "text_too_long")]


def test_a_row_that_is_no_text_leaves_for_all_models(place):
    rows = pair_rows(20)
    assert bad_rows(place, rows, '{"prompt": NaN, "chosen": NaN, "rejected": NaN}\n') == [(20, "malformed")]
