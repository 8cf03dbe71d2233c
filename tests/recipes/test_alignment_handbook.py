"""alignment-handbook's DPO recipes, each with one line more: it trains, or stops and names what is not carried."""

import json

import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.commands.train import run
from mrpo_scale.config.data_keys import parse_datasets
from mrpo_scale.config.recipe import parse
from mrpo_scale.data.inputs import read_rows
from tests.recipes.alignment_handbook import RECIPES
from tests.recipes.local import ROWS, command_line, made_local
from tests.tiny import write_models
from tests.tools import require_module

for package in ("peft", "bitsandbytes"):
    require_module(package, f"pip install {package}")

#: What stops a recipe: the keys that its one line names, and nothing else.
STOPPED = {
    "smollm3 apo": ["use_liger_kernel"],
}
TRAINED = ("constitutional-ai", "zephyr-7b-beta full", "smollm3 apo", "starchat2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


PROCESSES = ("preprocessing_num_workers", "dataset_num_proc")  # as few pairs as here need none


def written(name, folders, folder, without=()):
    folder.mkdir(exist_ok=True)
    recipe = {key: value for key, value in RECIPES[name].items() if key not in without}
    local = made_local(recipe, folder, folders["llama"])
    return command_line(local, [folders["qwen2"]], folder / "recipe.yaml")


def refusal(argv):
    """The one line that stops it; empty where it is taken."""
    try:
        parse(argv)
    except ConfigError as error:
        said = str(error)
        assert "\n" not in said and "did you mean" not in said and "unknown key" not in said, said
        return said
    return ""


@pytest.mark.parametrize("name", RECIPES)
def test_a_public_recipe_and_one_line(name, folders, tmp_path):
    stopped = STOPPED.get(name, [])
    said = refusal(written(name, folders, tmp_path / "as it is"))
    named = [key for key in RECIPES[name] if f"`{key}: " in said or f"`{key}`" in said]
    assert set(named) == set(stopped), said
    script, config = parse(written(name, folders, tmp_path / "without", stopped))
    given = RECIPES[name]
    assert (
        config.warmup_steps == 0.1
        and config.beta == given["beta"]
        and config.loss_type == [given.get("loss_type", "sigmoid")]
    )
    sets = given.get("dataset_mixture", {}).get("datasets") or [{"weight": 1.0} for _ in given["dataset_mixer"]]
    parts = [spec.subset for spec in parse_datasets(script.dataset_name)]
    assert parts == [None if one["weight"] == 1 else one["weight"] for one in sets]
    if "dataset_splits" in given:
        assert [script.dataset_train_split, script.dataset_test_split] == given["dataset_splits"]


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps_of_a_public_recipe(name, folders, tmp_path):
    run(written(name, folders, tmp_path, (*STOPPED.get(name, ()), *PROCESSES)))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    card = (tmp_path / "run" / "README.md").read_text()
    assert "anchor" in card and "qwen2" in card
    evaluated = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert bool(evaluated) == ("eval_steps" in RECIPES[name])


def test_the_sets_of_a_mixture_give_their_parts(folders, tmp_path):
    """Half of one set's rows and a quarter of the other's; `test_split_size` counts pairs of the whole mix, not of each set."""
    train, test = read_rows(*parse(written("smollm3 apo", folders, tmp_path, (*STOPPED["smollm3 apo"], *PROCESSES))))
    assert len(train) == ROWS // 2 + ROWS // 4 and test is None
    train, test = read_rows(*parse(written("starchat2", folders, tmp_path / "star", PROCESSES)))
    assert (len(train), len(test)) == (4 * ROWS - 10, 10)


def test_the_table_of_outcomes(folders, tmp_path):
    """pytest -s prints it."""
    print("\nalignment-handbook, each with `ref_models`")
    taken = 0
    for i, name in enumerate(RECIPES):
        said = refusal(written(name, folders, tmp_path / str(i)))
        taken += not said
        print(f"  {name:28} {'taken as it is' if not said else 'stops: ' + said}")
    assert taken == len(RECIPES) - len(STOPPED)
