"""Layouts and loading: hand-written rows and the pairs they must become, the rows refused, and the words of the errors."""

import json
from pathlib import Path

import datasets
import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data import LAYOUTS, BadRow, PreferencePair, find_layout, load_rows, merge_turns

USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "Be brief."}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
TOOL = {"type": "function", "function": {"name": "add"}}
PAIR = PreferencePair(prompt=[USER], chosen="4", rejected="5")


def gpt(text, who="gpt"):
    return {"from": who, "value": text}


# One row, the layout it must be recognised as, and the pair written by hand.
RECOGNISED = {
    "strings": ({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, "strings", PreferencePair("2+2?", " 4", " 5")),
    "explicit": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        "conversational",
        PreferencePair([SYSTEM, USER], "4", "5"),
    ),
    "implicit": (
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        "conversational",
        PreferencePair([SYSTEM, USER], "4", "5"),
    ),
    "ultrafeedback": (
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0},
        "conversational",
        PAIR,
    ),
    "string prompt beside responses": ({"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]}, "conversational", PAIR),
    "tools as JSON": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps([TOOL])},
        "conversational",
        PreferencePair([USER], "4", "5", tools=[TOOL]),
    ),
    "sharegpt": (
        {
            "conversations": [gpt("Hi", "human"), gpt("Hello"), gpt("2+2?", "human")],
            "chosen": gpt("4"),
            "rejected": gpt("5"),
            "system": "Be brief.",
        },
        "sharegpt",
        PreferencePair(
            [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER], "4", "5"
        ),
    ),
    # The responses share their first characters, and the text of a turn may hold a blank line: only turns count.
    "hh": (
        {
            "chosen": "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: It is 4",
            "rejected": "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: It is 5",
        },
        "hh_strings",
        PreferencePair(
            [{"role": "user", "content": "Hi\n\nthere"}, {"role": "assistant", "content": "Hello"}, USER],
            "It is 4",
            "It is 5",
        ),
    ),
}


@pytest.mark.parametrize("case", RECOGNISED)
def test_layout_is_recognised_and_read(case):
    row, name, expected = RECOGNISED[case]
    dataset = datasets.Dataset.from_list([row])
    layout = find_layout(dataset)
    assert layout.name == name
    assert layout.to_pair(dataset[0]) == expected
    assert [other.name for other in LAYOUTS.values() if other.matches(set(row), row)] == [name], "layouts overlap"


def test_keys_that_arrow_fills_with_none_are_dropped():
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
    answer = {"role": "tool", "name": "add", "content": "4"}
    rows = datasets.Dataset.from_list([{"prompt": [USER, call, answer], "chosen": [GOOD], "rejected": [BAD]}])
    assert rows[0]["prompt"][0]["tool_calls"] is None, "the case this test is about"
    assert find_layout(rows).to_pair(rows[0]).prompt == [USER, call, answer]


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
TOOL = {"role": "tool", "name": "add", "content": "4"}
OPENAI_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
}
#: (row of `conversational` or `hh_strings`, pair)
SEVERAL_TURNS = [
    ({"prompt": [USER], "chosen": [CALL, TOOL, GOOD], "rejected": [BAD]}, ([USER], [CALL, TOOL, GOOD], "5")),
    ({"prompt": [USER], "chosen": [CALL], "rejected": [BAD]}, ([USER], [CALL], "5")),
    ({"prompt": [USER], "chosen": [OPENAI_CALL], "rejected": [BAD]}, ([USER], [CALL], "5")),
    ({"prompt": [USER], "chosen": [{**GOOD, "tool_calls": []}], "rejected": [BAD]}, ([USER], "4", "5")),
    # The conversations part in an earlier turn than the last.
    (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
        ([USER], [GOOD, USER, GOOD], [BAD, USER, BAD]),
    ),
    ({"chosen": [USER, CALL, TOOL, GOOD], "rejected": [USER, CALL, TOOL, BAD]}, ([USER, CALL, TOOL], "4", "5")),
    # ... in what a tool says: the assistant's turn before it is part of both responses.
    (
        {"chosen": [USER, CALL, TOOL, GOOD], "rejected": [USER, CALL, {**TOOL, "content": "5"}, BAD]},
        ([USER], [CALL, TOOL, GOOD], [CALL, {**TOOL, "content": "5"}, BAD]),
    ),
    (
        {
            "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4\n\nHuman: 2+2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
        },
        ([USER], [GOOD, USER, GOOD], "5"),
    ),
]


@pytest.mark.parametrize(("row", "pair"), SEVERAL_TURNS)
def test_responses_of_several_turns_and_of_tool_calls_are_read(row, pair):
    layout = "hh_strings" if isinstance(row["chosen"], str) else "conversational"
    assert LAYOUTS[layout].to_pair(row) == PreferencePair(*pair)


HH = "\n\nHuman: q\n\nAssistant: "
REFUSED = [
    ("strings", {"prompt": "a", "chosen": None, "rejected": "b"}, "malformed", "`chosen` is missing"),
    ("strings", {"prompt": [USER], "chosen": "a", "rejected": "b"}, "malformed", "`prompt` is a list"),
    ("conversational", {"prompt": [USER], "chosen": "4", "rejected": [BAD]}, "malformed", "`chosen` is a str"),
    ("conversational", {"prompt": [USER], "chosen": ["4"], "rejected": [BAD]}, "malformed", "`chosen[0]`"),
    ("conversational", {"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "malformed", "`prompt` is a int"),
    ("conversational", {"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "malformed", "answers with a user"),
    ("conversational", {"chosen": [USER, GOOD, GOOD], "rejected": [USER, GOOD, BAD]}, "malformed", "an assistant turn"),
    ("conversational", {"prompt": [USER], "chosen": [], "rejected": [BAD]}, "empty_response", "`chosen` has no"),
    ("conversational", {"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "empty_prompt", ""),
    ("conversational", {"chosen": [GOOD], "rejected": [BAD]}, "empty_prompt", ""),
    ("conversational", {"chosen": [USER, GOOD], "rejected": [USER]}, "malformed", "`rejected` does not end"),
    ("conversational", {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "malformed", "ends with a user"),
    ("conversational", {"prompt": [USER], "chosen": [CALL, TOOL], "rejected": [BAD]}, "malformed", "ends with a tool"),
    (
        "conversational",
        {"prompt": [USER], "chosen": [TOOL, GOOD], "rejected": [BAD]},
        "malformed",
        "answers with a tool",
    ),
    ("conversational", {"chosen": [USER, CALL, TOOL], "rejected": [USER, BAD]}, "malformed", "does not end"),
    (
        "conversational",
        {"prompt": [USER], "chosen": [GOOD, SYSTEM, GOOD], "rejected": [BAD]},
        "malformed",
        "system turn",
    ),
    (
        "conversational",
        {"prompt": [USER], "chosen": [{**GOOD, "content": " "}, USER, GOOD], "rejected": [BAD]},
        "empty_response",
        "the assistant says nothing in message 1",
    ),
    *(
        (
            "conversational",
            {"prompt": [USER], "chosen": [{**GOOD, "tool_calls": calls}], "rejected": [BAD]},
            "malformed",
            words,
        )
        for calls, words in (
            ([{}], "`chosen[0].tool_calls[0]` names no function"),
            ("add", "`chosen[0].tool_calls` is a str, not a list"),
            (["add"], "`chosen[0].tool_calls[0]` names no function"),
            ([{"function": {"name": "add", "arguments": "{"}}], "its arguments are not JSON"),
            ([{"function": {"name": "add", "arguments": "[1]"}}], "its arguments are a list, not an object"),
            ([{"name": "add", "arguments": 2}], "its arguments are a int, not an object"),
        )
    ),
    ("conversational", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "[oops"}, "malformed", "JSON"),
    ("sharegpt", {"conversations": None, "chosen": gpt("4"), "rejected": gpt("5")}, "malformed", "`conversations`"),
    (
        "sharegpt",
        {"conversations": [gpt("q", "alien")], "chosen": gpt("4"), "rejected": gpt("5")},
        "malformed",
        "alien",
    ),
    ("sharegpt", {"conversations": [gpt("q", "human")], "chosen": "4", "rejected": gpt("5")}, "malformed", "`chosen`"),
    ("hh_strings", {"chosen": "Once" + HH + "a", "rejected": HH + "b"}, "malformed", "text before"),
    ("hh_strings", {"chosen": HH + "a", "rejected": "\n\nHuman: q"}, "malformed", "`rejected` does not end"),
]


@pytest.mark.parametrize(("layout", "row", "reason", "detail"), REFUSED)
def test_malformed_rows_are_refused_with_their_reason(layout, row, reason, detail):
    with pytest.raises(BadRow) as refused:
        LAYOUTS[layout].to_pair(row)
    assert refused.value.reason == reason
    assert detail in refused.value.detail


def test_equal_conversations_still_have_responses():
    """So that the row is counted as identical responses, not as malformed."""
    assert LAYOUTS["conversational"].to_pair({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}) == PreferencePair(
        [USER], "4", "4"
    )


def test_merge_turns():
    def say(role, content):
        return {"role": role, "content": content}

    before = [say("system", "S"), say("user", "a"), say("user", "b"), say("assistant", "c"), say("system", "T")]
    assert merge_turns(before) == [say("user", "S\n\nT\n\na\n\nb"), say("assistant", "c")]
    assert merge_turns([SYSTEM]) == [say("user", "Be brief.")]
    assert merge_turns([USER, GOOD]) == [USER, GOOD]


def test_no_layout_says_what_is_missing():
    rows = datasets.Dataset.from_list([{"prompt": "q", "chosen": "a", "extra": 1}])
    with pytest.raises(ConfigError) as error:
        find_layout(rows)
    message = str(error.value)
    assert "nearest is `strings`: column `rejected` is missing" in message
    assert "Columns found: prompt, chosen, extra" in message
    assert all(name in message for name in LAYOUTS)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "q", "response": "a", "rating": 3},
            "`helpsteer`: the first rows are not `prompt` and `response` strings",
        ),
        (
            {"prompt": "q", "answers": ["a", "b"]},
            "`nectar`: the first rows are not `prompt` a string, `answers` a list of",
        ),
        ({"question": "q", "chosen": "a"}, "`orca`: column `rejected` or `rejected_response` is missing"),
        ({"instruction": "q", "input": "", "output": "a"}, "`gpt4_llm`: the first rows are not an instruction"),
        ({"conversations": [gpt("q")], "chosen": gpt("a")}, "`sharegpt`: column `rejected` is missing"),
    ],
)
def test_the_nearest_layout_and_what_it_misses(row, words):
    with pytest.raises(ConfigError) as error:
        find_layout(datasets.Dataset.from_list([row]))
    assert f"nearest is {words}" in str(error.value)
    assert f"Columns found: {', '.join(row)}." in str(error.value)


def test_columns_that_fit_with_values_that_do_not():
    with pytest.raises(ConfigError, match="nearest is `strings`: the first rows are not all three plain strings"):
        find_layout(datasets.Dataset.from_list([{"prompt": 1, "chosen": 2, "rejected": 3}]))


def test_a_malformed_first_row_does_not_hide_the_layout():
    assert find_layout(
        datasets.Dataset.from_list([{**RECOGNISED["strings"][0], "chosen": None}, RECOGNISED["strings"][0]])
    )


def test_named_layout():
    rows = datasets.Dataset.from_list([RECOGNISED["strings"][0]])
    assert find_layout(rows, "strings").name == "strings"
    with pytest.raises(ConfigError, match="`dataset_layout: alpaca` is not known; choose auto or one of strings"):
        find_layout(rows, "alpaca")
    with pytest.raises(ConfigError, match="`dataset_layout: sharegpt` does not fit: column `conversations` is missing"):
        find_layout(rows, "sharegpt")


ROWS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(10)]


def write(folder, kind):
    """The ten rows as a file of one kind."""
    path = folder / f"pairs.{kind.removesuffix(' array')}"
    table = datasets.Dataset.from_list(ROWS)
    if kind == "json array":
        path = folder / "pairs.json"
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind in ("json", "jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.map(lambda row: row, cache_file_name=str(path))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["json", "json array", "jsonl", "csv", "parquet", "arrow"])
def test_local_files(tmp_path, kind):
    train, test = load_rows(write(tmp_path, kind))
    assert train.to_list() == ROWS
    assert test is None


def test_local_folder_with_splits(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    train, test = load_rows(str(folder), held_out=5)
    assert (train.to_list(), test.to_list()) == (ROWS, [ROWS[3]]), "a test split that exists wins over held_out"


def test_folder_of_save_to_disk(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "both")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "both"))[0].to_list() == load_rows(str(tmp_path / "one"))[0].to_list() == ROWS


@pytest.mark.parametrize(("held_out", "size"), [(0.2, 2), (3, 3), (3.0, 3), (0.01, 1)])
def test_held_out_rows_are_seeded_and_disjoint(tmp_path, held_out, size):
    path = write(tmp_path, "jsonl")
    train, test = load_rows(path, held_out=held_out, seed=1)
    assert len(test) == size
    assert sorted(train["prompt"][:] + test["prompt"][:]) == [row["prompt"] for row in ROWS]
    assert load_rows(path, held_out=held_out, seed=1)[1].to_list() == test.to_list()
    assert load_rows(path, held_out=5, seed=1)[1].to_list() != load_rows(path, held_out=5, seed=2)[1].to_list()


@pytest.mark.parametrize("held_out", [0, -1, 1.5, 10, 11])
def test_held_out_out_of_range(tmp_path, held_out):
    with pytest.raises(ConfigError, match=f"`held_out: {held_out}` must be a fraction .* below the 10 there are"):
        load_rows(write(tmp_path, "jsonl"), held_out=held_out)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "a/b/c", "org/pairs.parquet"])
def test_missing_local_path(name):
    with pytest.raises(
        ConfigError, match=f"`dataset_name: {name}`: there is no such file or folder .* correct the path"
    ):
        load_rows(name)


def test_unknown_splits_list_those_there_are(tmp_path):
    path = write(tmp_path, "jsonl")
    with pytest.raises(ConfigError, match=r"`dataset_train_split: train_prefs`.*no such split; choose one of train"):
        load_rows(path, train_split="train_prefs")
    with pytest.raises(ConfigError, match=r"`dataset_test_split: test_prefs`.*choose one of train"):
        load_rows(path, test_split="test_prefs", held_out=2)


def test_unreadable_files(tmp_path):
    broken, table = tmp_path / "broken.jsonl", tmp_path / "pairs.xlsx"
    broken.write_text("{not json\n")
    table.write_text("")
    with pytest.raises(ConfigError, match=r"`dataset_name: .*broken.jsonl` cannot be read: JSON parse error.*contents"):
        load_rows(str(broken))
    with pytest.raises(ConfigError, match=r"not one of .json, .jsonl, .parquet, .arrow, .csv"):
        load_rows(str(table))


def test_one_row_of_another_shape_spoils_that_row_only(tmp_path):
    path = tmp_path / "mixed.jsonl"
    good, odd = RECOGNISED["explicit"][0], {**RECOGNISED["explicit"][0], "chosen": "four"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, odd, good)))
    rows, _ = load_rows(str(path))
    layout = find_layout(rows)
    assert layout.to_pair(rows[0]) == layout.to_pair(rows[2]) == RECOGNISED["explicit"][2]
    with pytest.raises(BadRow, match="malformed: `chosen` is a str, not a list"):
        layout.to_pair(rows[1])


@pytest.mark.parametrize("name", ["pairs[1]", "pairs*", "pairs?", "two words", "a::b", "{a}", "100%20"])
def test_any_name_of_a_file_or_folder(tmp_path, name, monkeypatch):
    """`datasets` reads patterns and chains of file systems into some of them; neighbours that would fit a pattern are not read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}

    def write(path, count):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({**row, "chosen": f" {i}"}) + "\n" for i in range(count)))

    write(tmp_path / "pairs1.jsonl", 9)
    write(tmp_path / "pairs1" / "train.jsonl", 9)
    write(tmp_path / f"{name}.jsonl", 2)
    write(tmp_path / name / "train.jsonl", 3)
    write(tmp_path / name / "test[1].jsonl", 1)
    assert len(load_rows(str(tmp_path / f"{name}.jsonl"))[0]) == 2
    assert [len(rows) for rows in load_rows(str(tmp_path / name))] == [3, 1]
    write(tmp_path / f"{name}.jsonl", 4)
    (tmp_path / name / "test[1].jsonl").unlink()
    train, test = load_rows(str(tmp_path / name))
    assert (len(load_rows(str(tmp_path / f"{name}.jsonl"))[0]), len(train), test) == (4, 3, None), "as they are now"
    train.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / f"saved {name}")
    assert len(load_rows(str(tmp_path / f"saved {name}"))[0]) == 3


@pytest.mark.parametrize("readme", [True, False], ids=["readme", "files alone"])
def test_folders_of_one_name_are_two_data_sets(tmp_path, readme):
    """Where a README.md names the files, `datasets` gave the second the rows of the first, and the old rows after a change."""
    front = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    folders = [tmp_path / name / "pairs" for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
        if readme:
            (folder / "README.md").write_text(front)
        (folder / "train.jsonl").write_text(json.dumps({**ROWS[0], "prompt": str(folder)}) + "\n")
    assert [load_rows(str(folder))[0][0]["prompt"] for folder in folders] == list(map(str, folders))
    (folders[0] / "train.jsonl").write_text(json.dumps({**ROWS[0], "prompt": "a changed text"}) + "\n")
    assert load_rows(str(folders[0]))[0][0]["prompt"] == "a changed text"
    assert load_rows(str(folders[1]))[0][0]["prompt"] == str(folders[1])


def test_files_of_one_name_are_two_data_sets(tmp_path):
    files = [tmp_path / name / "pairs.jsonl" for name in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps({**ROWS[0], "prompt": str(file)}) + "\n")
    assert [load_rows(str(file))[0][0]["prompt"] for file in files] == list(map(str, files))
    files[0].write_text(json.dumps({**ROWS[0], "prompt": "x" * len(str(files[0]))}) + "\n")
    assert load_rows(str(files[0]))[0][0]["prompt"].startswith("xxx")


def test_a_part_of_a_set_and_some_of_its_columns(tmp_path):
    path = write(tmp_path, "jsonl")
    half = load_rows({"name": path, "subset": 0.5, "columns": ["prompt", "chosen", "rejected"]}, held_out=2)
    assert (len(half[0]), len(half[1])) == (3, 2) and half[0].column_names == ["prompt", "chosen", "rejected"]
    assert len(load_rows({"name": path, "subset": 4})[0]) == 4
    with pytest.raises(ConfigError, match=r"subset: 11.*below the 10 there are"):
        load_rows({"name": path, "subset": 11})
    with pytest.raises(ConfigError, match=r"no column `chosn`.*there are .*chosen"):
        load_rows({"name": path, "columns": ["chosn"]})
    for bad, what in (({"subset": "half"}, "a number above 0"), ({"columns": "chosen"}, "a list of names")):
        with pytest.raises(ConfigError, match=what):
            load_rows({"name": path, **bad})


OF_ALL = [({"held_out": 6}, (24, 6)), ({"held_out": 0.1}, (26, 4)), ({"train_subset": 20}, (20, 10))]


@pytest.mark.parametrize(("keys", "sizes"), OF_ALL)
def test_a_number_of_pairs_is_that_of_all_sets(tmp_path, keys, sizes):
    """In proportion to their sizes, so that a small set beside a large one is not used up."""
    paths = []
    for size in (20, 6, 4):
        paths.append(str(tmp_path / f"{size}.jsonl"))
        Path(paths[-1]).write_text(
            "".join(json.dumps({**ROWS[0], "prompt": f"{size} {i}"}) + "\n" for i in range(size))
        )
    train, test = load_rows(paths, **keys)
    assert (len(train), len(test)) == sizes
    with pytest.raises(ConfigError, match="below the 30 there are"):
        load_rows(paths, held_out=30)
