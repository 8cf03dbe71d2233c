"""Several data sets as one, and the splits: which pairs are drawn, that draws repeat, and that messages name the set."""

import json
from pathlib import Path

import datasets
import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.recipe import parse
from mrpo_scale.data import DatasetSpec, PairOptions, PreferencePair, as_pairs, find_layout, load_rows, parse_datasets
from mrpo_scale.data.pair_dataset import prepare_pairs
from tests.data.test_tokenization import chatml

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write(name, count, bad=()):
        """``count`` string pairs; those numbered in ``bad`` have contradictory scores."""
        rows = [
            {
                "prompt": f"{name} {i}",
                "chosen": "a",
                "rejected": "b",
                "score_chosen": 1,
                "score_rejected": 3 * (i in bad),
            }
            for i in range(count)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def prompts(table):
    return table["prompt"][:]


def drawn(table, name):
    return sum(prompt.startswith(name) for prompt in prompts(table))


# ---- mixes -----------------------------------------------------------------------------------------------------------


def test_without_weights_every_pair_of_every_set(write):
    table, test = load_rows([write("a", 5), write("b", 3)])
    assert sorted(prompts(table)) == [f"a {i}" for i in range(5)] + [f"b {i}" for i in range(3)]
    assert test is None


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [((1, 1), (8, 8)), ((3, 1), (24, 8)), ((0.25, 0.75), (2, 8)), ((9, 1), (40, 4))],
    ids=["equal", "b runs out", "fractions: 2.67 pairs are 2", "a runs out"],
)
def test_weights_are_shares_and_the_set_that_runs_out_ends_the_mix(write, weights, sizes):
    """40 and 8 pairs."""
    names = [write("a", 40), write("b", 8)]
    table, _ = load_rows([{"name": name, "weight": weight} for name, weight in zip(names, weights, strict=True)])
    assert (drawn(table, "a"), drawn(table, "b")) == sizes
    assert len(set(prompts(table))) == len(table), "no pair is taken twice"


def test_draws_depend_on_the_seed_alone(write):
    sets = [{"name": write("a", 40), "weight": 1}, {"name": write("b", 8), "weight": 1}]
    first, again, other = (load_rows(sets, seed=seed)[0] for seed in (1, 1, 2))
    assert first.to_list() == again.to_list()
    assert set(prompts(first)) != set(prompts(other)), "another part of the larger set"
    assert first._fingerprint == again._fingerprint != other._fingerprint
    assert prompts(first)[:8] != sorted(prompts(first))[:8], "the sets are shuffled together"


def test_bad_rows_come_along_in_proportion_and_do_not_count_for_the_share(write):
    """b has 8 pairs, 4 of them bad: 4 good ones and as many of a. All of a is good."""
    bad = (0, 2, 4, 6)
    table, _ = load_rows([{"name": write("a", 40), "weight": 1}, {"name": write("b", 8, bad), "weight": 1}])
    good = [row for row in table if not row["reason"]]
    assert len(good) == 8
    assert drawn(table, "a") == 4
    assert 0 < len(table) - len(good) <= 4


def test_sets_of_different_layouts_side_by_side_and_messages_that_name_them(write):
    nectar, strings = str(FIXTURES / "nectar.jsonl"), write("a", 3, bad=(1,))
    table, _ = load_rows([{"name": nectar, "layout": "nectar"}, strings])
    layout = find_layout(table, "auto")
    assert find_layout(table, "strings") is not layout, "a mix is read as a mix whatever the recipe names for its sets"
    pairs = prepare_pairs(table, layout, [chatml()], max_length=None, max_bad_rows=0.5)
    texts = [pairs.pair(i) for i in range(len(pairs))]
    assert PreferencePair("a 2", "a", "b") in texts
    assert PreferencePair([{"role": "user", "content": "Say hi"}], "Hi!", "hey you") in texts
    assert pairs.counts == {"tied_ranks": 1, "rank_missing": 1, "contradictory_scores": 1}
    detail = "`score_chosen` 1 is below `score_rejected` 3"
    assert {"dataset": strings, "row": 1, "reason": "contradictory_scores", "detail": detail} in pairs.bad_rows()
    sources = {pairs.source(i) for i in range(len(pairs))}
    assert {f"{strings}: row 0", f"{strings}: row 2", f"{nectar}: row 2"} <= sources
    with pytest.raises(ConfigError, match=r"`on_bad_row: error`: \S+.jsonl: row [12] of the train set is bad"):
        prepare_pairs(table, layout, [chatml()], max_length=None, on_bad_row="error")


@pytest.mark.slow
def test_messages_tools_and_system_turns_survive_the_table(tmp_path):
    tools, other = str(FIXTURES / "tools.jsonl"), str(FIXTURES / "orca.jsonl")
    table, _ = load_rows([tools, other])
    mixed = [find_layout(table).to_pair(row) for row in table]
    for name in (tools, other):
        rows, layout = as_pairs(load_rows(name)[0], find_layout(load_rows(name)[0]), PairOptions())
        assert all(layout.to_pair(row) in mixed for row in rows)


def test_test_splits_of_all_sets_together(tmp_path, write):
    folder = tmp_path / "with_test"
    folder.mkdir()
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"prompt": f"{split} {i}", "chosen": "a", "rejected": "b"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = load_rows([str(folder), write("a", 10)], held_out=3)
    assert (len(train), len(test)) == (4 + 7, 2 + 3), "a set's own test split, and held-out rows of the one without"
    assert not set(prompts(train)) & set(prompts(test))


def test_one_set_with_its_own_split_and_layout(tmp_path):
    """A mapping's layout wins, and is not asked for again of what it became."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "question": "Q"}]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "validation.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (folder / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    table, _ = load_rows({"name": str(folder), "split": "validation", "layout": "orca"})
    assert find_layout(table).to_pair(table[0]) == PreferencePair([{"role": "user", "content": "Q"}], "a", "b")
    assert table[0]["source"] == f"{folder} (validation)"


def test_a_recipe_names_several_sets(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("dataset_name:\n  - {name: a, weight: 3, config: x}\n  - {name: b, weight: 1, layout: nectar}\n")
    script, config = parse(["--config", str(recipe), "--ranked_pairs", "best_vs_random", "--seed", "5"])
    assert script.datasets == [DatasetSpec("a", config="x", weight=3), DatasetSpec("b", weight=1, layout="nectar")]
    assert config.pair_options == PairOptions("best_vs_random", ("helpfulness",), 5)
    script, _ = parse(["--config", str(recipe), "--dataset_name", "org/one"])
    assert (script.dataset_name, script.datasets) == ("org/one", [DatasetSpec("org/one")])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"name": "a", "wieght": 1}], "unknown key `wieght`; known keys are name, config, split, weight, layout"),
        ([{"weight": 1}], "key `name` is missing"),
        ([{"name": "a", "weight": 0}], "`weight: 0` must be a number above 0"),
        ([{"name": "a", "weight": 1}, "b"], "`b` has no `weight` but others have; give all of them one, or none"),
        (["{oops"], "is not a name nor a JSON mapping"),
        ([3], "must be a name or a mapping, got int"),
    ],
)
def test_mistakes_in_dataset_name(value, words):
    with pytest.raises(ConfigError) as error:
        parse_datasets(value)
    assert words in str(error.value)


def test_a_set_without_a_usable_pair_has_no_share(write):
    with pytest.raises(ConfigError, match=r"`\S+b.jsonl` has no usable pair, so no mix with its weight is possible"):
        load_rows([{"name": write("a", 4), "weight": 1}, {"name": write("b", 2, bad=(0, 1)), "weight": 1}])


def test_an_unknown_layout_in_a_mix_names_the_set(tmp_path, write):
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"text": "q"}) + "\n")
    with pytest.raises(ConfigError, match=r"`\S+odd.jsonl`: `dataset_layout: auto`: no layout fits.*found: text"):
        load_rows([write("a", 4), str(odd)])


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_those_of_train_test_split(write):
    """What `datasets` itself would choose, in its order: a seed that was used before gives the same rows."""
    path = write("a", 20)
    train, test = load_rows(path, held_out=0.1, seed=3)
    expected = load_rows(path)[0].train_test_split(test_size=0.1, seed=3)
    assert (prompts(train), prompts(test)) == (prompts(expected["train"]), prompts(expected["test"]))


def test_held_out_rows_that_lie_together_keep_their_numbers(write):
    """One row is always a contiguous selection, which `datasets` would turn into a slice that begins at 0."""
    path = write("a", 9)
    _, test = load_rows(path, held_out=1, seed=3)
    pairs = prepare_pairs(test, find_layout(test), [chatml()], max_length=None)
    assert prompts(test) == [f"a {pairs.source_row(0)}"]
    assert pairs.source_row(0) != 0, "the case must be one in which it matters"


@pytest.mark.parametrize(("subset", "size"), [(0.1, 2), (5, 5), (0.01, 1)])
def test_a_small_training_subset_and_the_remainder_as_test(write, subset, size):
    path = write("a", 20)
    train, test = load_rows(path, train_subset=subset)
    assert (len(train), len(test)) == (size, 20 - size)
    assert sorted(prompts(train) + prompts(test)) == sorted(f"a {i}" for i in range(20))
    assert prompts(load_rows(path, train_subset=subset)[0]) == prompts(train)
    assert prompts(load_rows(path, train_subset=subset, seed=7)[0]) != prompts(train)


def test_a_training_subset_beside_held_out_rows_or_a_test_split(tmp_path, write):
    path = write("a", 20)
    train, test = load_rows(path, train_subset=0.5, held_out=4)
    assert (len(train), len(test)) == (8, 4), "half of the 16 that are left; the rest is not used"
    assert prompts(test) == prompts(load_rows(path, held_out=4)[1]), "the same held-out rows whatever the subset"
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(10)]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "test.jsonl").write_text(rows[0])
    train, test = load_rows(str(folder), train_subset=3, held_out=4)
    assert (len(train), len(test)) == (3, 1), "a test split that exists wins"


@pytest.mark.parametrize("subset", [0, 1.5, 20])
def test_a_training_subset_out_of_range(write, subset):
    with pytest.raises(ConfigError, match=f"`train_subset: {subset}` must be a fraction .* below the 20 there are"):
        load_rows(write("a", 20), train_subset=subset)


@pytest.mark.parametrize("options", [{"held_out": 0.5}, {"train_subset": 0.5}])
def test_answers_to_one_prompt_are_never_on_both_sides(tmp_path, options):
    """30 prompts with 3 answers each: rows are split by prompt, so both sides have whole prompts only."""
    rows = [{"prompt": f"{i % 30}", "response": f"{i}", "helpfulness": i // 30} for i in range(90)]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = load_rows(str(path), **options)
    assert (len(train), len(test)) == (45, 45)
    assert not set(prompts(train)) & set(prompts(test))
    pairs = prepare_pairs(test, find_layout(test), [chatml()], max_length=None)
    assert len(pairs) == 15 * 3
    for i in range(len(pairs)):
        number = pairs.source_row(i)
        assert rows[number]["response"] == pairs.pair(i).chosen, "row numbers are those of the file"


# ---- tables on disk --------------------------------------------------------------------------------------------------


def test_tables_are_memory_mapped_and_read_again_for_the_same_options(monkeypatch):
    def table(**options):
        rows, _ = load_rows(str(FIXTURES / "helpsteer.jsonl"))
        return as_pairs(rows, find_layout(rows), PairOptions(**options))[0]

    first = table()
    assert first.cache_files, "memory-mapped from a file"
    others = [table(ranked_pairs="best_vs_worst"), table(seed=1), table(score_columns=("helpfulness", "correctness"))]
    assert len({t._fingerprint for t in (first, *others)}) == 4, "every option is part of the key"

    def must_not_run(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr("mrpo_scale.data.pair_table._read_groups", must_not_run)
    assert table().to_list() == first.to_list()


@pytest.mark.parametrize("num_proc", [None, pytest.param(2, marks=pytest.mark.processes)])
def test_processes_do_not_change_a_table(tmp_path, num_proc):
    rows = [{"prompt": f"{i // 4}", "response": f"{i}", "helpfulness": i % 4} for i in range(400)]
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded, _ = load_rows(str(path))
    table, _ = as_pairs(loaded, find_layout(loaded), PairOptions(ranked_pairs="best_vs_random"), num_proc)
    assert len(table) == 100
    alone = datasets.Dataset.from_list(rows)
    assert table.to_list() == as_pairs(alone, find_layout(alone), PairOptions("best_vs_random"))[0].to_list()
