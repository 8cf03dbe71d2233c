"""What a caller brings, before any weights load: rows in every form, tokens that a model has no row for, lists of bad rows."""

import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoConfig, AutoTokenizer

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.inputs import as_datasets, prepare_sets
from mrpo_scale.models.plan import num_embeddings, pad_token_id, plan_models
from tests.tiny import pair_dataset, pair_rows, write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def config(folder, **keys):
    return MRPOConfig(
        output_dir=str(folder),
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 1, **keys},
    )


# ---- rows from Python ------------------------------------------------------------------------------------------------


def test_lists_and_dataset_dicts_are_data_sets(folders, tmp_path):
    """The same losses, whatever form the rows come in."""
    rows, held_out = pair_rows(6), pair_rows(3, 1)
    forms = {
        "dataset": (pair_dataset(6), pair_dataset(3, 1)),
        "lists": (rows, held_out),
        "dict": (datasets.DatasetDict(train=pair_dataset(6), test=pair_dataset(3, 1)), None),
    }
    found = {}
    for name, (train, evals) in forms.items():
        trainer = MRPOTrainer(folders["llama"], [], config(tmp_path / name, gradient_checkpointing=False), train, evals)
        trainer.train()
        found[name] = (trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"])
    assert found["lists"] == found["dict"] == found["dataset"]


def test_a_list_keeps_columns_that_its_first_row_lacks():
    first, *others = pair_rows(3)
    train, _ = as_datasets([first, *({**row, "score_chosen": 1.0} for row in others)], None)
    assert train["score_chosen"][:] == [None, 1.0, 1.0]


def test_evaluation_sets_of_their_own_win_over_those_of_a_dataset_dict():
    both = datasets.DatasetDict(train=pair_dataset(6), test=pair_dataset(5))
    train, evals = as_datasets(both, {"one": pair_rows(2), "two": pair_dataset(3)})
    assert len(train) == 6 and {name: len(rows) for name, rows in evals.items()} == {"one": 2, "two": 3}


STREAM = datasets.IterableDataset.from_generator(lambda: iter(pair_rows(3)))


@pytest.mark.parametrize(
    ("train", "evals", "message"),
    [
        (STREAM, None, "`train_dataset` is an IterableDataset, .*without `streaming=True`"),
        (pair_dataset(2), {"a": STREAM}, r"`eval_dataset\['a'\]` is an IterableDataset"),
        (datasets.IterableDatasetDict(train=STREAM), None, "`train_dataset` is an IterableDatasetDict"),
        (datasets.DatasetDict(a=pair_dataset(2)), None, r"a DatasetDict without `train`; .*train_dataset\['a'\]"),
        (
            {"prompt": ["a"]},
            None,
            "`train_dataset` is a dict; pass a `datasets.Dataset`, a DatasetDict or a list of rows",
        ),
        ("rows.jsonl", None, "`train_dataset` is a str; pass"),
        ([{"prompt": "a"}, {"prompt": 1}], None, "`train_dataset`: its rows make no table: .*values of one kind"),
    ],
)
def test_rows_that_make_no_data_set(tmp_path, train, evals, message):
    """In one line, and before a model is looked for: there is none here."""
    with pytest.raises(ConfigError, match=message) as error:
        MRPOTrainer("no/model", [], config(tmp_path), train, evals)
    assert "\n" not in str(error.value)


# ---- tokens without a row ----------------------------------------------------------------------------------------------


def two_more_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids("<new2>")


@pytest.mark.parametrize("name", ["policy", "qwen2"])
def test_tokens_beyond_a_models_rows_are_refused(tmp_path, name, monkeypatch):
    folders = write_models(tmp_path / "models")
    folder = folders["llama" if name == "policy" else name]
    rows = AutoConfig.from_pretrained(folder).vocab_size
    token = two_more_tokens(folder)
    data = pair_rows(9)
    monkeypatch.setattr("mrpo_scale.training.prepare.load_policy", None)  # no weights load
    args = config(tmp_path / "run", anchor=folders["gpt_neox"])
    plan = plan_models(folders["llama"], [folders["qwen2"]], args, None)
    prepare_sets(plan, args, datasets.Dataset.from_list(data), None)  # none of them has the new tokens
    data[4]["rejected"][0]["content"] += " <new2> yes"
    with pytest.raises(ConfigError) as error:
        MRPOTrainer(folders["llama"], [folders["qwen2"]], args, data, None)
    message = str(error.value)
    assert message.startswith(
        f"{name}: its tokenizer makes token {token} ('<new2>') of row 4 of the train set, but its"
    )
    assert f"its embedding has {rows} rows" in message and "\n" not in message


def test_a_padded_vocabulary_and_a_wrappers_text_model(tmp_path):
    folders = write_models(tmp_path)
    path = Path(folders["llama"]) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 512}))
    plan = plan_models(folders["llama"], [], config(tmp_path / "run"), None, weights_needed=False)
    assert plan.readers[0].num_embeddings == plan.readers[1].num_embeddings == 512
    wrapper = AutoConfig.for_model("gemma3", text_config={"vocab_size": 96})
    assert num_embeddings(wrapper) == 96


def test_padding_takes_a_token_that_the_model_has(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    own = tokenizer.pad_token_id
    assert pad_token_id(tokenizer, 300) == own
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert pad_token_id(tokenizer, 300) == tokenizer.eos_token_id
    assert pad_token_id(tokenizer, None) == tokenizer.pad_token_id == len(tokenizer) - 1


# ---- bad rows ------------------------------------------------------------------------------------------------------------


def test_the_error_names_an_example_and_the_list(folders, tmp_path):
    args = config(tmp_path / "run")
    plan = plan_models(folders["llama"], [], args, None)
    rows = pair_rows(6)
    rows[3]["chosen"][0]["content"] = " "
    listed = tmp_path / "run" / "bad_rows_train.jsonl"
    listed.parent.mkdir()
    (listed.parent / "bad_rows_old.jsonl").write_text("of an earlier run\n")
    with pytest.raises(ConfigError) as error:
        prepare_sets(plan, args, datasets.Dataset.from_list(rows), None)
    assert f"For example row 3: empty_response (chosen has no text). All bad rows are listed in {listed}." in str(
        error.value
    )
    assert json.loads(listed.read_text())["row"] == 3
    assert [path.name for path in listed.parent.glob("bad_rows_*")] == [listed.name]
    prepare_sets(plan, args, pair_dataset(6), None)
    assert not listed.exists(), "of an earlier run"


def test_findings_keep_the_pairs(folders, tmp_path):
    """For a check: what would stop the run, and what is left all the same."""
    rows = pair_rows(6)
    rows[3]["chosen"] = rows[3]["rejected"]
    args = config(tmp_path)
    plan = plan_models(folders["llama"], [], args, None)
    findings: list[ConfigError] = []
    sets = prepare_sets(plan, args, datasets.Dataset.from_list(rows), pair_dataset(2), findings)
    assert {split: len(pairs) for split, pairs in sets.items()} == {"train": 5, "eval": 2}
    assert [str(finding).split(":")[0] for finding in findings] == ["`max_bad_rows"]
    assert sets["train"].lengths.shape == (5, 1, 3)
