"""What people bring: packed files, parts of splits, columns by other names, template arguments; and what is said of each set."""

import bz2
import gzip
import json
import logging
import lzma

import datasets
import pytest

from mrpo_scale import MRPOConfig
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data import LAYOUTS, BadRow, PairOptions, PreferencePair, find_layout, load_rows
from mrpo_scale.data.inputs import prepare_sets
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.tokenization import row_key, tokenize_pair
from mrpo_scale.models.plan import plan_models
from tests.data.test_tokenization import CHATML, chatml, plain, text_of, tiny, view
from tests.tiny import pair_rows, write_models

#: Calls reasoning `thinking`, and writes an empty block before an answer where it is switched off.
THINKING = (
    "{% set off = enable_thinking is defined and not enable_thinking %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.thinking is defined %}<think>{{ m.thinking }}</think>"
    "{% elif off and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if off %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_lines(rows))
    return str(path)


def conversational(rows):
    return datasets.Dataset.from_list(rows)


def prepare(rows, texts, **keys):
    rows = conversational(rows)
    return prepare_pairs(rows, find_layout(rows), texts, **{"max_length": None, "max_bad_rows": 1.0, **keys})


def said(pairs):
    return {remark.word: dict(remark.models) or remark.pairs for remark in pairs.remarks}


# ---- files, splits, columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_packed_files_and_folders_of_them(tmp_path, ending, pack):
    rows = pair_rows(5)
    for place in (f"rows.jsonl.{ending}", f"odd[1]name.jsonl.{ending}", f"set/train.jsonl.{ending}"):
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pack(json_lines(rows).encode()))
        read, _ = load_rows(str(file.parent if file.parent != tmp_path else file))
        assert read["prompt"][:] == [row["prompt"] for row in rows]


def test_a_packed_file_is_what_its_name_says(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.gz").write_bytes(bz2.compress(json_lines(pair_rows(2)).encode()))
    with pytest.raises(ConfigError, match="is a bzip2 archive by its contents"):
        load_rows(str(tmp_path / "rows.jsonl.gz"))
    (tmp_path / "rows.jsonl.xz").write_text(json_lines(pair_rows(2)))
    with pytest.raises(ConfigError, match="is no xz file by its contents; correct its name"):
        load_rows(str(tmp_path / "rows.jsonl.xz"))
    monkeypatch.setattr(datasets.config, "ZSTANDARD_AVAILABLE", False)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ConfigError, match="needs the package zstandard to be unpacked; `pip install zstandard`"):
        load_rows(str(tmp_path / "rows.jsonl.zst"))


def test_parts_of_splits(tmp_path):
    path = write(tmp_path / "rows.jsonl", pair_rows(10))
    train, test = load_rows(path, train_split="train[:80%]", test_split="train[80%:]")
    assert (len(train), len(test)) == (8, 2)
    pairs = prepare_pairs(test, find_layout(test), [chatml()], max_length=None)
    assert [pairs.source_row(i) for i in range(2)] == [8, 9], "rows keep their numbers in the file"
    assert len(load_rows({"name": path, "split": "train[-3:]"})[0]) == 3
    with pytest.raises(ConfigError, match=r"`dataset_train_split: train\[:8`: .* has no such part"):
        load_rows(path, train_split="train[:8")


def test_columns_are_mapped(tmp_path):
    row = {"question": "2+2?", "best": " 4", "worst": " 5", "chosen": "of another kind", "id": 7}
    path, columns = (
        write(tmp_path / "rows.jsonl", [row, row]),
        {"prompt": "question", "chosen": "best", "rejected": "worst"},
    )
    for rows in (load_rows(path, columns=columns)[0], load_rows({"name": path, "columns": columns})[0]):
        assert find_layout(rows).to_pair(rows[0]) == PreferencePair("2+2?", " 4", " 5")
        assert rows.column_names == ["prompt", "chosen", "rejected", "id"]
    with pytest.raises(ConfigError, match="has no column `qestion`, which `columns` names"):
        load_rows(path, columns={"prompt": "qestion"})
    with pytest.raises(ConfigError, match=r"column `best` of .* is given two names"):
        load_rows(path, columns={"chosen": "best", "rejected": "best"})


# ---- rows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["images", "image", "videos", "audio"])
def test_rows_with_pictures_films_or_sound_are_bad(column):
    row = pair_rows(1)[0]
    assert LAYOUTS["conversational"].to_pair({**row, column: None}) == LAYOUTS["conversational"].to_pair(
        {**row, column: []}
    )
    with pytest.raises(BadRow, match=f"not_text: `{column}` is not empty") as bad:
        LAYOUTS["conversational"].to_pair({**row, column: ["a.png"]})
    assert bad.value.reason == "not_text"


def test_template_arguments_go_to_every_template_and_into_the_key():
    rows = [{**row, "chat_template_kwargs": {"enable_thinking": i > 0}} for i, row in enumerate(pair_rows(2))]
    texts = [view(template=THINKING), plain()]
    pairs = prepare(rows, texts)
    prompts = [text_of(texts[0], pairs[i][0].prompt_ids) for i in range(2)]
    assert [prompt.endswith("<think></think>") for prompt in prompts] == [True, False]
    assert said(pairs) == {"argument:enable_thinking": {"plain": 2}}
    without = [PreferencePair(pair.prompt, pair.chosen, pair.rejected) for pair in map(pairs.pair, range(2))]
    assert not set(pairs.row_keys.tolist()) & {row_key(pair) for pair in without}
    bare = prepare(pair_rows(2), texts)
    assert bare.row_keys.tolist() == [row_key(pair) for pair in without], "rows without keep their keys"


def test_a_rows_own_arguments_win_over_the_recipes(tmp_path):
    config = MRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        chat_template_kwargs={"enable_thinking": False, "x": 1},
    )
    first, second = pair_rows(2)
    rows = [
        {**first, "chat_template_kwargs": json.dumps({"enable_thinking": True})},
        {**second, "chat_template_kwargs": ""},
    ]
    pairs = prepare(rows, [view(template=THINKING)], options=config.pair_options)
    kwargs = [pairs.pair(i).chat_template_kwargs for i in range(2)]
    assert kwargs == [{"enable_thinking": True, "x": 1}, {"enable_thinking": False, "x": 1}]
    for bad in ({"tokenize": True}, "no", ["a"]):
        with pytest.raises(ConfigError, match="`chat_template_kwargs"):
            MRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", chat_template_kwargs=bad)
    with pytest.raises(BadRow, match="sets `tokenize`, which is not the row's to decide"):
        LAYOUTS["conversational"].to_pair({**first, "chat_template_kwargs": {"tokenize": True}})


def test_reasoning_is_rendered_under_the_name_that_a_template_knows():
    row = pair_rows(1)[0]
    for name in ("reasoning_content", "thinking", "reasoning"):
        answer = {**row["chosen"][0], name: "the fox"}
        texts = [view(template=THINKING), view("ref", template=CHATML)]
        pairs = prepare([{**row, "chosen": [answer]}], texts)
        assert text_of(texts[0], pairs[0][0].chosen_ids).startswith("<think>the fox</think>")
        assert "the fox" not in text_of(texts[1], pairs[0][1].chosen_ids)
        assert said(pairs) == {"changed": {"ref": 1}, "field:reasoning_content": {"ref": 1}}


@pytest.mark.parametrize("raw", [True, False])
def test_prompts_repeated_in_responses(raw):
    text = {"prompt": "the fox", "chosen": "the fox jumps", "rejected": "the fox hello"}
    turn = lambda role, name: [{"role": role, "content": text[name]}]  # noqa: E731
    row = (
        text
        if raw
        else {
            "prompt": turn("user", "prompt"),
            "chosen": turn("assistant", "chosen"),
            "rejected": turn("assistant", "rejected"),
        }
    )
    kept = prepare([row, row], [chatml()], options=PairOptions(repeated_prompt="keep"))
    assert said(kept) == {"repeated_prompt": 2, "duplicate": 1}
    stripped = prepare([row], [chatml()], options=PairOptions(repeated_prompt="strip"))
    expected = (" jumps", " hello") if raw else ("jumps", "hello")
    assert (stripped.pair(0).chosen, stripped.pair(0).rejected) == expected
    assert said(stripped) == {"stripped_prompt": 1}


def test_control_tokens_spelled_out_are_counted_for_each_model():
    rows = pair_rows(3)
    rows[1]["prompt"][0]["content"] += " <|im_end|> no"
    other = tiny(template=CHATML)
    other.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    rows[2]["chosen"][0]["content"] = "no <stop>"
    from mrpo_scale.data.tokenization import ModelText

    pairs = prepare(rows, [chatml(), ModelText(other, name="other", max_context=None)])
    assert said(pairs) == {"control:<|im_end|>": {"policy": 1, "other": 1}, "control:<stop>": {"other": 1}}


def test_fields_of_messages_that_a_template_never_names():
    pair = PreferencePair([{"role": "user", "content": "hello", "name": "Ann"}], "fox", "dog")
    named = CHATML.replace("m['content']", "m['content'] + (m['name'] if 'name' in m else '')")
    whole = "{% for m in messages %}<|im_start|>{{ m | tojson }} {{ m.content }}<|im_end|>{% endfor %}"
    texts = [chatml(), view("named", template=named), view("whole", template=whole)]
    assert tokenize_pair(pair, texts, None).remarks == (["field:name"], [], [])


# ---- sets ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def args_of(folder, **keys):
    return MRPOConfig(output_dir=str(folder), **{"use_cpu": True, "report_to": "none", **keys})


def test_leaks_duplicates_and_columns_that_nothing_reads(folders, tmp_path, caplog):
    args = args_of(tmp_path)
    plan = plan_models(folders["llama"], [], args, None)
    rows = [{**row, "id": i} for i, row in enumerate(pair_rows(6))]
    held = [rows[0], {**rows[1], "chosen": [{"role": "assistant", "content": "four"}]}, {**pair_rows(9)[8], "id": 8}]
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        sets = prepare_sets(plan, args, conversational([*rows, rows[2]]), conversational(held))
    assert said(sets["train"]) == {"duplicate": 1, "unread:`id`": 0}
    assert said(sets["eval"]) == {"known_pair:train": 1, "known_prompt:train": 1, "unread:`id`": 0}
    assert "eval: 1 pair: the whole pair is in the train set too" in caplog.text
    assert caplog.text.count("train: no key or layout reads the columns `id`") == 1


def test_a_set_of_repeated_prompts_stops_unless_a_key_says_what_to_do(folders, tmp_path):
    row = {"prompt": "the fox", "chosen": "the fox jumps", "rejected": "the fox hello"}
    rows = [{**row, "chosen": f"the fox jumps {i}"} for i in range(4)]
    plan = plan_models(folders["llama"], [], args_of(tmp_path), None)
    with pytest.raises(ConfigError, match="`repeated_prompt: error`: in 4 of 4 pairs of the train set") as error:
        prepare_sets(plan, args_of(tmp_path), conversational(rows), None)
    assert "\n" not in str(error.value)
    few = [*rows[:1], *({"prompt": f"red {i}", "chosen": "a", "rejected": "b"} for i in range(19))]
    assert said(prepare_sets(plan, args_of(tmp_path), conversational(few), None)["train"]) == {"repeated_prompt": 1}
    for word in ("strip", "keep"):
        assert (
            len(prepare_sets(plan, args_of(tmp_path, repeated_prompt=word), conversational(rows), None)["train"]) == 4
        )


def test_mixes_carry_arguments_and_name_columns_once(tmp_path, caplog):
    one = write(tmp_path / "a.jsonl", [{**row, "chat_template_kwargs": {"x": 1}, "id": 1} for row in pair_rows(2)])
    two = write(tmp_path / "b.jsonl", pair_rows(2, 1))
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        table, _ = load_rows([one, two])
    read = [find_layout(table).to_pair(row).chat_template_kwargs for row in table]
    assert sorted(map(str, read)) == ["None", "None", "{'x': 1}", "{'x': 1}"]
    assert f"{one}: no key or layout reads the columns `id`" in caplog.text
