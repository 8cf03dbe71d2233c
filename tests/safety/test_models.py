"""Hostile model folders: code, pickles, files elsewhere, absurd sizes, templates that break out or never end."""

import json
import os
import pickle
import shutil

import pytest

import mrpo_scale.data.chat_template
from mrpo_scale.cli import run_command
from tests.safety.hostile import Trap, bounded, edit, tensors

F32 = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}


def pickled(name):
    def spoil(place, folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Trap(place.executed)))

    return spoil


def weights(header, data=bytes(64)):
    return lambda place, folder: (folder / "model.safetensors").write_bytes(tensors(header, data))


def length(place, folder):
    file = folder / "model.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])


def index(content):
    def spoil(place, folder):
        shutil.move(folder / "model.safetensors", place.root / "outside.safetensors")
        text = content(place) if callable(content) else content
        (folder / "model.safetensors.index.json").write_text(text if isinstance(text, str) else json.dumps(text))

    return spoil


def config(**keys):
    return lambda place, folder: edit(folder / "config.json", **keys)


def file(name, content):
    return lambda place, folder: (folder / name).write_text(content)


def code_of_its_own(place, folder):
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    place.trap(f"{folder.name}/evil.py")


def tokenizer_code(place, folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    place.trap(f"{folder.name}/evil.py")


def fifo(place, folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def adapter(place, folder):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(place.root / "another")})
    )


def gguf(place, folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")


CASES = {
    "a pickle in pytorch_model.bin": (pickled("pytorch_model.bin"), ["no safetensors", "pytorch_model.bin"]),
    "a pickle in model.pt": (pickled("model.pt"), ["no safetensors", "model.pt"]),
    "a pickle called safetensors": (
        lambda p, f: (f / "model.safetensors").write_bytes(pickle.dumps(Trap(p.executed))),
        ["not a whole safetensors file"],
    ),
    "GGUF": (gguf, ["no safetensors", "model.gguf"]),
    "an adapter beside weights": (adapter, ["adapter_config.json", "merge"]),
    "a FIFO for weights": (fifo, ["no safetensors"]),
    "an index that climbs": (
        index({"weight_map": {"a": "../outside.safetensors"}}),
        ["'../outside.safetensors'", "not the name of a file in its folder"],
    ),
    "an index with a root": (
        index(lambda p: {"weight_map": {"a": f"{p.root}/outside.safetensors"}}),
        ["not the name of a file in its folder"],
    ),
    "an index without a map": (index([]), ["no `weight_map`"]),
    "an index of numbers": (index({"weight_map": {"a": 5}}), ["no `weight_map`"]),
    "an index that is no JSON": (index("no"), ["index.json is not JSON"]),
    "an index of brackets": (index("[" * 100_000), ["nested too deep"]),
    "a header of 2^60 bytes": (length, ["not a whole safetensors file", "header too large"]),
    "a tensor beyond the file": (
        weights({"a": {**F32, "shape": [1000], "data_offsets": [0, 4000]}}),
        ["not a whole safetensors file"],
    ),
    "tensors that overlap": (weights({"a": F32, "b": F32}), ["not a whole safetensors file"]),
    "a negative size": (weights({"a": {**F32, "shape": [-16]}}), ["not a whole safetensors file", "-16"]),
    "a size that overflows": (
        weights({"a": {**F32, "shape": [1 << 40, 1 << 40]}}),
        ["not a whole safetensors file", "overflow"],
    ),
    "a header of brackets": (weights(b'{"a":' + b"[" * 200_000), ["not a whole safetensors file", "recursion"]),
    "a header of 100 MB": (
        weights(b'{"__metadata__":{"a":"' + b"x" * 100_000_000 + b'"}}'),
        ["not a whole safetensors file"],
    ),
    "a vocabulary of 2^40": (config(vocab_size=1 << 40), ["1099511627776 tokens", "do not belong together"]),
    "2^30 layers": (config(num_hidden_layers=1 << 30), ["1073741824 layers", "do not belong together"]),
    "a width that is text": (config(hidden_size="abc"), ["config.json", "hidden_size"]),
    "a config of brackets": (file("config.json", "[" * 100_000), ["no config.json could be read"]),
    "a config that is a list": (file("config.json", "[]"), ["holds no config.json"]),
    "code of its own": (code_of_its_own, ["trust_remote_code"]),
    "attention code from the hub": (
        config(_attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
        ["evil/kernel", "attn_implementation"],
    ),
    "a tokenizer with code": (tokenizer_code, ["no tokenizer could be read", "custom code"]),
    "a tokenizer of brackets": (file("tokenizer.json", "[" * 200_000), ["no tokenizer could be read"]),
    "a tokenizer that is a list": (file("tokenizer_config.json", "[1]"), ["no tokenizer could be read"]),
}


AS_REFERENCE = [
    "a pickle in pytorch_model.bin",
    "an adapter beside weights",
    "an index that climbs",
    "2^30 layers",
    "code of its own",
]


@pytest.mark.parametrize(
    ("key", "case"),
    [("model_name_or_path", case) for case in CASES] + [("ref_models", case) for case in AS_REFERENCE],
    ids=lambda name: name.replace(" ", "-"),
)
def test_models(key, case, place):
    spoil, says = CASES[case]
    folder = place.model()
    spoil(place, folder)
    place.refused("train", place.words(**{key: folder}), *says)


@pytest.mark.parametrize("case", ["a pickle in pytorch_model.bin", "code of its own", "an index that climbs"])
def test_models_to_evaluate(case, place):
    spoil, says = CASES[case]
    folder = place.model()
    spoil(place, folder)
    words = [f"--model={folder}", f"--dataset_name={place.data}", f"--output_dir={place.run}"]
    place.refused("eval", words, *says)


def test_consent_is_for_one_model(place):
    """The policy's consent does not cover a reference with code, nor the other way round."""
    folder = place.model("qwen2")
    code_of_its_own(place, folder)
    place.refused("train", place.words(ref_models=folder, trust_remote_code="true"), "trust_remote_code")
    trusted = json.dumps({"model": place.models["qwen2"], "trust_remote_code": True})
    place.refused("train", place.words(model_name_or_path=folder, ref_models=trusted), "trust_remote_code")


def test_a_snapshot_of_the_hub_trains_and_the_code_beside_it_does_not_run(place):
    """Its files are links to blobs of the same repository. auto_map of a known type and `custom_generate` are code for others:
    transformers' own class trains."""
    repository = place.root / "hub" / "models--o--m"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    source = place.model()
    edit(source / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (repository / "blobs").mkdir()
    for i, entry in enumerate(sorted(source.iterdir())):
        entry.rename(repository / "blobs" / str(i))
        (snapshot / entry.name).symlink_to(f"../../blobs/{i}")
    place.trap(f"{snapshot.relative_to(place.root)}/evil.py")
    place.trap(f"{snapshot.relative_to(place.root)}/custom_generate/generate.py")
    with bounded():
        run_command("train", place.words(model_name_or_path=snapshot))
    assert (place.run / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()
    assert (place.run / "model.safetensors").exists() and not place.executed.exists()


def test_a_link_out_of_a_model_is_not_published(place):
    """A tokenizer file that links to a secret would be copied into the trained model, and pushed with it."""
    folder = place.model()
    (folder / "vocab.txt").symlink_to(place.write("id_rsa", "PRIVATE KEY"))
    place.refused(
        "train", place.words(model_name_or_path=folder), "vocab.txt is a link to", "outside the model's folder"
    )


TURNS = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
TEMPLATES = {
    "the classes of a string": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ["unsafe"]),
    "the globals of a helper": ("{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}", ["unsafe"]),
    "an attribute by filter": ("{{ (''|attr('__class__')).__mro__ }}", ["unsafe"]),
    "a change of the messages": ("{{ messages.append(1) }}", ["unsafe"]),
    "a file": ("{% include '/etc/passwd' %}", ["no loader"]),
    "an import": ("{% import '/etc/passwd' as x %}", ["no loader"]),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", ["Range too big"]),
    "loops in loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        ["has computed for 0.5 s"],
    ),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["RecursionError"]),
    "ten terabytes": ("{{ 'a' * 10**13 }}", ["MemoryError"]),
    "a division by zero": ("{{ 1 / 0 }}", ["ZeroDivisionError"]),
}


@pytest.mark.parametrize(
    ("where", "case"),
    [("in the model", case) for case in TEMPLATES]
    + [(where, "the globals of a helper") for where in ("chat_template", "plain_template")],
    ids=lambda name: name.replace(" ", "-"),
)
def test_templates(where, case, place, monkeypatch):
    monkeypatch.setattr(mrpo_scale.data.chat_template, "_MOST_SECONDS", 0.5)
    text, says = TEMPLATES[case]
    text = text.replace("EXECUTED", str(place.executed)) + TURNS
    change = {where: text}
    if where == "in the model":
        folder = place.model()
        (folder / "chat_template.jinja").write_text(text)
        change = {"model_name_or_path": folder}
    elif where == "plain_template":
        change["ref_models"] = place.models["gpt_neox"]  # which has none of its own
    place.refused("train", place.words(**change), "chat template", *says)


def test_a_template_that_fails_on_one_row_loses_that_row(place):
    template = TURNS + "{% if messages[0].content.startswith('3 ') %}{{ 1 / 0 }}{% endif %}"
    with bounded():
        run_command("score", place.words(chat_template=template, max_bad_rows=0.5, ref_cache_dir=place.root / "cache"))
    listed = "".join(file.read_text() for file in place.run.glob("bad_rows_*.jsonl"))
    assert listed.count("template_rejected:policy") == listed.count("ZeroDivisionError") == 1


def test_a_template_file_that_is_no_text(place):
    file = place.write("t.jinja", b"\xff{{")
    place.refused("train", place.words(chat_template=file), "t.jinja", "not UTF-8")
