"""Hostile recipes and keys: YAML that constructs, explodes or never ends, and values that mean more than they say."""

import json
import os

import pytest

from mrpo_scale.config.recipe import read_recipe


def laughs():
    """Ten lists, each of ten times the one before."""
    lists = ["&a [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"&{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]" for i in range(9)]
    return f"ref_models: [{', '.join(lists)}]"


RECIPES = {
    "a Python object": (
        lambda p: f"beta: !!python/object/apply:os.system ['touch {p.executed}']",
        ["not valid YAML", "tag"],
    ),
    "a Python name": (lambda p: "beta: !!python/name:os.system ''", ["not valid YAML", "tag"]),
    "aliases that explode": (lambda p: laughs(), ["aliases stand for more than 100000 values"]),
    "an alias within itself": (lambda p: "ref_models: &a [*a]", ["which has no end"]),
    "10,000 brackets": (lambda p: "ref_models: " + "[" * 10_000, ["nested too deep"]),
    "a key given twice": (lambda p: "beta: 0.1\nbeta: 0.2", ["`beta` is given twice"]),
    "bytes that are no text": (lambda p: b"beta: \xff\xfe", ["not UTF-8"]),
    "NUL": (lambda p: b"beta: \x00", ["not valid YAML"]),
    "a tab": (lambda p: "beta:\t0.1\n\tseed: 3", ["not valid YAML", "\\t"]),
    "an integer of 5,000 digits": (lambda p: "seed: " + "9" * 5000, ["not valid YAML", "5000 digits"]),
    "a seed of 30 digits": (lambda p: "seed: " + "9" * 30, ["`seed: 999", "from 0 to 4294967295"]),
    "a day that is none": (lambda p: "run_name: 2020-99-99", ["not valid YAML", "month"]),
    "two megabytes": (lambda p: "# " + "x" * (2 << 20), ["more than 1048576 bytes"]),
}


@pytest.mark.parametrize("case", RECIPES, ids=lambda name: name.replace(" ", "-"))
def test_recipes(case, place):
    text, says = RECIPES[case]
    recipe = place.write("recipe.yaml", text(place))
    place.refused("train", ["--config", str(recipe), *place.words()], *says)


def test_scoring_refuses_an_attention_that_is_not_there(place):
    words = place.words(attn_implementation="fast", ref_cache_dir=place.root / "cache")
    place.refused("score", words, "`attn_implementation: fast` is not known")


@pytest.mark.parametrize("command", ["score", "inspect", "compare"])
def test_every_command_reads_recipes_alike(command, place):
    text, says = RECIPES["a Python object"]
    place.refused(command, ["--config", str(place.write("recipe.yaml", text(place)))], "recipe.yaml", *says)


def test_recipes_that_are_no_files(place):
    (place.root / "folder.yaml").mkdir()
    os.mkfifo(place.root / "fifo.yaml")
    for name in ("folder.yaml", "fifo.yaml"):
        place.refused("train", ["--config", str(place.root / name)], "is no file and no recipe")
    place.refused("train", ["--config", "/proc/self/mem"], "/proc/self/mem cannot be read")


def test_merge_keys_are_yaml(place):
    recipe = place.write("recipe.yaml", "x: &base {beta: 0.3, seed: 3}\n<<: *base\nbeta: 0.2\n")
    assert read_recipe(recipe) == {"x": {"beta": 0.3, "seed": 3}, "beta": 0.2, "seed": 3}


KEYS = {
    "consent in quotes": (
        lambda p: {"ref_models": spoilt_with_code(p, trust_remote_code="false")},
        ["trust_remote_code: 'false'", "without quotes"],
    ),
    "a number for a model": (lambda p: {"ref_models": '{"model": 5}'}, ["ref_models.model: 5", "text"]),
    "a number for a data set": (lambda p: {"dataset_name": '{"name": 5}'}, ["name: 5", "text"]),
    "a deep mapping": (lambda p: {"ref_models": '{"a":' * 20_000}, ["nested too deep"]),
    "an escape sequence": (lambda p: {"dataset_name": "\x1b[2J./x.json"}, ["\\x1b[2J", "no such file"]),
}


def spoilt_with_code(place, **keys):
    folder = place.model()
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    place.trap(f"{folder.name}/evil.py")
    return json.dumps({"model": str(folder), **keys})


@pytest.mark.parametrize("case", KEYS, ids=lambda name: name.replace(" ", "-"))
def test_keys(case, place):
    change, says = KEYS[case]
    assert "\x1b" not in place.refused("train", place.words(**change(place)), *says)
