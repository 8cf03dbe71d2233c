"""The key of a reference: it changes with whatever its scores depend on, with nothing else, and costs no second reading."""

import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.model_text import ModelText
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.references.store import identity
from mrpo_scale.references.store.identity import ReferenceIdentity, canonical_json, identify
from tests.tiny import CHATML, tokenizer, write_models

_opened: list[str] | None = None


def _note_open(event, args):
    if event == "open" and _opened is not None and isinstance(args[0], str | bytes | os.PathLike):
        _opened.append(os.path.realpath(os.fsdecode(args[0])))


sys.addaudithook(_note_open)  # for good: Python has no way to remove one


@contextmanager
def files_opened():
    """Every file that Python opens in the block."""
    global _opened
    _opened = files = []
    try:
        yield files
    finally:
        _opened = None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: Path(path) for name, path in write_models(tmp_path_factory.mktemp("models")).items()}


@pytest.fixture
def folder(models, tmp_path):
    return Path(shutil.copytree(models["llama"], tmp_path / "llama"))


def text_of(folder, **options):
    return ModelText(AutoTokenizer.from_pretrained(folder), name="ref", max_context=512, **options)


def identity_of(folder, memo_dir=None, *, text=None, **source):
    return identify(ReferenceSource("ref", str(folder), **source), folder, text or text_of(folder), memo_dir)


def other_weights(folder):
    """The same names, shapes and file sizes, and one number that differs."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})


def split_weights(folder):
    """The checkpoint as two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- what the key depends on


def test_models_of_one_shape_with_other_weights_never_share_a_key(folder, tmp_path):
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    assert identity_of(twin).key == identity_of(folder).key
    other_weights(twin)
    assert (twin / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    assert identity_of(twin).key != identity_of(folder).key


def test_every_file_of_a_sharded_checkpoint_counts(folder):
    whole = identity_of(folder)
    split_weights(folder)
    before = identity_of(folder)
    assert list(before.parts["weights"]) == ["model-1.safetensors", "model-2.safetensors"] and before.key != whole.key
    keys = {before.key}
    for file in before.parts["weights"]:
        weights = load_file(folder / file)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, folder / file, metadata={"format": "pt"})
        keys.add(identity_of(folder).key)
    assert len(keys) == 3


def test_files_that_trade_places_change_the_key(folder):
    split_weights(folder)
    before = identity_of(folder)
    (folder / "model-1.safetensors").rename(folder / "x")
    (folder / "model-2.safetensors").rename(folder / "model-1.safetensors")
    (folder / "x").rename(folder / "model-2.safetensors")
    assert identity_of(folder).key != before.key


def change_one_byte_of_the_config(folder):
    file = folder / "config.json"
    text = file.read_text()
    assert '"rms_norm_eps": 1e-06' in text
    file.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def change_the_tokenizer(folder):
    tokenizer(CHATML, 290).save_pretrained(folder)  # ten merges fewer


def change_the_template(folder):
    tok = AutoTokenizer.from_pretrained(folder)
    tok.chat_template = tok.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tok.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (other_weights, "weights"),
        (change_one_byte_of_the_config, "config"),
        (change_the_tokenizer, "text"),
        (change_the_template, "text"),
    ],
)
def test_each_file_that_matters_changes_its_part_and_the_key(folder, change, part):
    before = identity_of(folder)
    change(folder)
    after = identity_of(folder)
    assert {name for name in before.parts if before.parts[name] != after.parts[name]} == {part}
    assert after.key != before.key


@pytest.mark.parametrize(
    ("source", "part"),
    [({"dtype": torch.bfloat16}, "dtype"), ({"attn_implementation": "eager"}, "attn_implementation")],
)
def test_each_setting_that_matters_changes_its_part_and_the_key(folder, source, part):
    before, after = identity_of(folder), identity_of(folder, **source)
    assert {name for name in before.parts if before.parts[name] != after.parts[name]} == {part}
    assert after.key != before.key


def test_a_template_or_system_setting_of_the_recipe_changes_the_key(folder):
    keys = {
        identity_of(folder).key,
        identity_of(folder, text=text_of(folder, system="merge")).key,
        identity_of(folder, text=text_of(folder, chat_template=CHATML + " ")).key,
    }
    assert len(keys) == 3


def test_the_scoring_version_changes_the_key(folder, monkeypatch):
    before = identity_of(folder)
    monkeypatch.setattr(identity, "SCORING", identity.SCORING + 1)
    assert identity_of(folder).key != before.key


def test_names_and_places_do_not_change_the_key(folder, tmp_path):
    before = identity_of(folder)
    moved = folder.rename(tmp_path / "another name")
    (moved / "README.md").write_text("a note")
    (moved / "model.safetensors").touch()
    source = ReferenceSource("another", str(moved), revision="main")
    after = identify(source, moved, text_of(moved), None)
    assert after.key == before.key and (after.name, after.path) == ("another", str(moved))
    linked = tmp_path / "link"
    linked.symlink_to(moved)
    assert identity_of(linked).key == before.key


def test_code_of_a_model_counts_once_the_user_lets_it_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "modeling_own.py").write_text("SCALE = 1")
    # Without auto_map nothing runs it, without consent neither.
    assert identity_of(folder, trust_remote_code=True).parts["code"] == {}
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    )
    assert identity_of(folder).parts["code"] == {}
    before = identity_of(folder, trust_remote_code=True)
    assert before.parts["code"] == {"modeling_own.py": hashlib.sha256(b"SCALE = 1").hexdigest()}
    (folder / "modeling_own.py").write_text("SCALE = 2")
    assert identity_of(folder, trust_remote_code=True).key != before.key
    snapshot = Path(shutil.copytree(folder, tmp_path / "snapshots" / ("c" * 40)))
    assert identity_of(snapshot, trust_remote_code=True).parts["code"] == {"commit": "c" * 40}


def test_the_key_is_of_the_values_and_not_of_their_order():
    parts = {"weights": {"a": "1", "b": "2"}, "dtype": "float32"}
    key = ReferenceIdentity("a", parts).key
    assert key == ReferenceIdentity("b", {"dtype": "float32", "weights": {"b": "2", "a": "1"}}, "elsewhere").key
    assert len(key) == 32 and set(key) <= set("0123456789abcdef")
    assert key != ReferenceIdentity("a", {**parts, "dtype": None}).key


def test_parts_survive_json_and_can_be_read(folder):
    found = identity_of(folder)
    assert json.loads(canonical_json(found.parts)) == found.parts
    assert found.parts["weights"] == {
        "model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    }
    assert found.parts["dtype"] == "float32" and found.parts["attn_implementation"] is None


# --- the memo


def test_a_second_run_opens_no_weight_file(folder, tmp_path):
    split_weights(folder)
    text, memo = text_of(folder), tmp_path / "memo"
    weights = {str(file.resolve()) for file in folder.glob("*.safetensors")}
    with files_opened() as files:
        first = identity_of(folder, memo, text=text)
    assert weights <= set(files)  # so the check below can fail
    with files_opened() as files:
        second = identity_of(folder, memo, text=text)
    assert second == first and not weights & set(files)
    assert identity_of(folder, None, text=text) == first


def test_a_touched_file_is_read_again(folder, tmp_path):
    text, file = text_of(folder), folder / "model.safetensors"
    first = identity_of(folder, tmp_path, text=text)
    info = file.stat()
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    with files_opened() as files:
        assert identity_of(folder, tmp_path, text=text) == first
    assert str(file) in files


def test_new_contents_under_old_times_are_noticed(folder, tmp_path):
    """`rsync --times` and `cp --preserve` bring the modification time of another file of the same size; ctime tells."""
    text, file = text_of(folder), folder / "model.safetensors"
    first = identity_of(folder, tmp_path, text=text)
    info = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with open(file, "r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (info.st_mtime_ns, info.st_ino)
    assert identity_of(folder, tmp_path, text=text).key != first.key


def test_a_change_within_one_tick_of_the_file_clock_is_noticed(folder, tmp_path):
    """File times move every 4 ms or so; a tiny file is written, hashed and written again in less."""
    file, memo = folder / "weights", tmp_path / "memo"
    for i in range(20):
        for content in (b"a%d" % i, b"b%d" % i):
            with open(file, "wb") as stream:
                stream.write(content)
            assert identity.hash_files([file], memo) == [hashlib.sha256(content).hexdigest()]


def test_a_file_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    text, real = text_of(folder), identity.hash_file

    def hash_and_write(file, advance):
        digest = real(file, advance)
        with open(file, "ab") as stream:
            stream.write(b"\0")
        return digest

    monkeypatch.setattr(identity, "hash_file", hash_and_write)
    with pytest.raises(ConfigError, match=r"model\.safetensors changed while it was read"):
        identity_of(folder, text=text)


def test_a_damaged_memo_is_made_anew(folder, tmp_path):
    text = text_of(folder)
    first = identity_of(folder, tmp_path, text=text)
    (memo,) = (tmp_path / "file_hashes").iterdir()
    good = memo.read_bytes()
    digit = good.index(first.parts["weights"]["model.safetensors"].encode())
    other_digit = good[:digit] + (b"0" if good[digit : digit + 1] != b"0" else b"1") + good[digit + 1 :]
    for content in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        good[:-3],
        other_digit,
        good.replace(b'"sha256"', b'"sha255"'),
    ):
        memo.write_bytes(content)
        assert identity_of(folder, tmp_path, text=text) == first
        assert memo.read_bytes() == good
    memo.unlink()
    memo.mkdir()  # not a file at all
    assert identity_of(folder, tmp_path, text=text) == first


def test_a_memo_that_cannot_be_written_only_costs_time(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level("INFO"):
        found = identity_of(folder, tmp_path / "file")
    assert found == identity_of(folder) and "cannot be written" in caplog.text


# --- hub snapshots


def test_blobs_of_the_hub_are_not_read(folder, tmp_path):
    text = text_of(folder)
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    expected = identity_of(folder, text=text)
    for file in ("config.json", "model.safetensors"):
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        name = digest if file != "config.json" else digest[:40]  # small files are named by git's sha1
        shutil.copy(folder / file, blobs / name)
        (snapshot / file).symlink_to(f"../../blobs/{name}")
    with files_opened() as files:
        found = identity_of(snapshot, tmp_path / "memo", text=text)
    assert found.key == expected.key
    assert not [file for file in files if Path(file).parent == blobs and len(Path(file).name) == 64]
    assert not (tmp_path / "memo").exists()


def test_links_elsewhere_are_read(folder, tmp_path):
    """A name of 64 digits means a hash in the hub's cache only."""
    expected = identity_of(folder)
    elsewhere = tmp_path / ("0" * 64)
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    assert identity_of(folder).key == expected.key


# --- errors


def test_a_folder_without_its_files(folder):
    text = text_of(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"ref: .*config\.json cannot be read \(No such file"):
        identity_of(folder, text=text)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors"):
        identity_of(folder, text=text)


def test_progress_is_shown_for_large_files_only(folder, monkeypatch, capsys):
    text = text_of(folder)
    identity_of(folder, text=text)
    assert "Hashing" not in capsys.readouterr().err
    monkeypatch.setattr(identity, "_SHOW_PROGRESS", 1)
    identity_of(folder, text=text)
    assert "Hashing weights: 100%" in capsys.readouterr().err
