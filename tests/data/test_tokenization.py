"""One text for every model: boundaries, ends of turns, cuts, bad rows and cache keys, with tiny tokenizers trained here."""

import json
import logging
from dataclasses import replace

import datasets
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data import LAYOUTS, BadRow, PreferencePair
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.pairs import Cut, PairTokens
from mrpo_scale.data.tokenization import ModelText, row_key, tokenize_pair

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "Human: hello\n\nAssistant: hello there, how are you?"] * 9
LONG = "the quick brown fox jumps over the lazy dog, naïve 😀😀😀 and 日本語 too " * 3


def tiny(vocab=300, *, template=None, bos=False, eos="</s>", corpus=CORPUS):
    """A byte-level BPE; with ``bos`` it wraps a text in <s> ... </s> of its own accord."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def view(name="policy", max_context=None, system="native", chat_template=None, **options):
    tokenizer = tiny(**options)
    return ModelText(tokenizer, name=name, max_context=max_context, system=system, chat_template=chat_template)


def chatml(name="policy", **options):
    return view(name, template=CHATML, **options)


def gemma(name="gemma", **options):
    return view(name, template=GEMMA, vocab=320, bos=True, **options)


def plain(name="plain", **options):
    return view(name, vocab=280, bos=True, **options)


def say(*contents):
    """Messages that alternate user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def text_of(model, ids):
    return model.tokenizer.decode(ids)


PAIR = PreferencePair(prompt=say("hello"), chosen="how are you?", rejected="the lazy dog")

# ---- prompts, boundaries, ends of turns ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "prompt", "end"),
    [
        (chatml(), "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (gemma(), "<s><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
        (plain(), "<s>Human: hello\n\nAssistant: ", "</s>"),
    ],
    ids=["chatml", "gemma", "plain"],
)
def test_prompt_and_response_in_each_template(model, prompt, end):
    """Written by hand: one BOS where the model has one, no EOS after the prompt, the template's own end of turn."""
    (tokens,) = tokenize_pair(PAIR, [model], None).tokens
    assert text_of(model, tokens.prompt_ids) == prompt
    assert text_of(model, tokens.chosen_ids) == "how are you?" + end
    assert text_of(model, tokens.rejected_ids) == "the lazy dog" + end


def test_plain_template_writes_system_and_earlier_turns():
    messages = [{"role": "system", "content": "S"}, *say("a", "b", "c")]
    assert (
        plain().render_prompt(PreferencePair(messages, "x", "y"))
        == "S\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    )


def test_raw_strings_are_read_as_they_are():
    """No template even where the model has one; BOS where the tokenizer adds it; eos, not the template's end of turn."""
    raw = PreferencePair(prompt="hello ", chosen="there", rejected="dog")
    first, second = tokenize_pair(raw, [chatml(), gemma()], None).tokens
    assert [text_of(chatml(), ids) for ids in (first.prompt_ids, first.chosen_ids)] == ["hello ", "there</s>"]
    assert [text_of(gemma(), ids) for ids in (second.prompt_ids, second.rejected_ids)] == ["<s>hello ", "dog</s>"]


def test_neither_bos_nor_end_is_written_twice():
    raw = PreferencePair(prompt="<s>hello", chosen="there</s>", rejected="dog")
    (tokens,) = tokenize_pair(raw, [plain()], None).tokens
    assert text_of(plain(), tokens.prompt_ids) == "<s>hello"
    assert text_of(plain(), tokens.chosen_ids) == "there</s>"


def test_boundary_is_exact():
    """Prompt and responses are tokenized apart: no token spans the boundary, whatever the response begins with."""
    model = plain()
    joined = model.tokenizer("hello there", add_special_tokens=False)["input_ids"]
    (tokens,) = tokenize_pair(PreferencePair("hel", "lo there", "x"), [model], None).tokens
    assert text_of(model, tokens.prompt_ids) == "<s>hel"
    assert text_of(model, tokens.chosen_ids) == "lo there</s>"
    assert tokens.prompt_ids[1:] + tokens.chosen_ids[:-1] != joined, (
        "the case must be one in which joining merges tokens"
    )


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools[0]['function']['name'] + ' ' }}{% endif %}" + CHATML
    tool = {"type": "function", "function": {"name": "adder"}}
    pair = PreferencePair(say("hello"), "a", "b", tools=[tool])
    assert view(template=template).render_prompt(pair).startswith("adder <|im_start|>user")


def test_given_template_replaces_the_models_own(tmp_path):
    (tmp_path / "own.jinja").write_text(GEMMA)
    expected = "<s><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
    for given in (GEMMA, str(tmp_path / "own.jinja")):
        assert chatml(chat_template=given).render_prompt(PAIR) == expected
    with pytest.raises(ConfigError, match=r"policy: `chat_template: .*none.jinja` is neither Jinja text nor a file"):
        chatml(chat_template=str(tmp_path / "none.jinja"))


def test_a_template_that_ignores_the_generation_prompt_still_opens_the_turn():
    model = view(template=CHATML.split("{% if add_generation_prompt")[0])
    assert model.render_prompt(PAIR) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_end_of_turn_skips_white_space_among_the_added_tokens():
    """Gemma lists "\\n" as an added token; it does not end a turn."""
    tokenizer = tiny(template="{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    tokenizer.add_tokens(["\n"])
    model = ModelText(tokenizer, name="policy", max_context=None)
    assert text_of(model, model.response_ids("dog", raw=False, cut=False)) == "dog</s>"


# ---- what a model must have ------------------------------------------------------------------------------------------


def test_no_way_to_end_a_turn():
    with pytest.raises(ConfigError, match=r"ref-b: its template ends no turn .* no eos token; set `eos_token`"):
        plain("ref-b", eos=None)


class SlowOfMine(ByT5Tokenizer):
    """A model's own slow tokenizer, beside which its file has a fast one."""


class SlowOfMineFast(PreTrainedTokenizerFast):
    pass


class Renamed(ByT5Tokenizer):  # as transformers 5 names its slow classes a second time
    pass


RenamedFast = Renamed


class Qwen2Tokenizer(ByT5Tokenizer):  # of the name that transformers has a conversion for
    pass


def test_slow_tokenizers_are_refused_by_the_name_of_their_fast_counterpart():
    listed = ByT5Tokenizer(
        auto_map={"AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x_fast.XTokenizerFast"]}
    )
    counterparts = {
        "XTokenizerFast": listed,
        "SlowOfMineFast": SlowOfMine(),
        r"convert_slow_tokenizer\(tokenizer\)": Qwen2Tokenizer(),
        "it has no fast counterpart in": ByT5Tokenizer(),
        "it has no fast counterpart": Renamed(),
    }
    for fast, slow in counterparts.items():
        kind = type(slow).__name__
        with pytest.raises(ConfigError, match=rf"ref-b: {kind} is a slow tokenizer.*{fast}.*") as error:
            ModelText(slow, name="ref-b", max_context=None)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ raise_exception('no') }}", "cannot be rendered: no"), ("{{ 'hi' }}", "does not write assistant turns")],
)
def test_useless_templates(template, words):
    with pytest.raises(ConfigError, match=f"policy: its chat template {words}.*give a `chat_template`"):
        view(template=template)


# ---- system turns ----------------------------------------------------------------------------------------------------

WITH_SYSTEM = PreferencePair([{"role": "system", "content": "Be brief."}, *say("hello")], "a", "b")
TWO_USERS = PreferencePair(say("hello") + say("there"), "a", "b")


@pytest.mark.parametrize("system", ["native", "error"])
@pytest.mark.parametrize(("pair", "why"), [(WITH_SYSTEM, "System role not supported"), (TWO_USERS, "must alternate")])
def test_turns_a_template_rejects(system, pair, why):
    with pytest.raises(
        ConfigError, match=f"`system: {system}`: gemma's chat template rejects .*{why}.*`system: merge`"
    ):
        gemma(system=system).render_prompt(pair)


def test_merged_turns():
    model = gemma(system="merge")
    start, end = "<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    assert model.render_prompt(WITH_SYSTEM) == f"{start}Be brief.\n\nhello{end}"
    assert model.render_prompt(TWO_USERS) == f"{start}hello\n\nthere{end}"
    assert chatml(system="merge").render_prompt(WITH_SYSTEM).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert tokenize_pair(WITH_SYSTEM, [chatml(system="merge"), model], None).merged == (False, True)


def test_system_text_that_a_template_drops_without_a_word():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    assert "brief" not in view(template=template).render_prompt(WITH_SYSTEM)
    assert "Be brief.\n\nhello" in view(template=template, system="merge").render_prompt(WITH_SYSTEM)
    with pytest.raises(ConfigError, match="drops system turns"):
        view(template=template, system="error").render_prompt(WITH_SYSTEM)


# ---- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", range(24, 150, 3))
def test_cut_text_is_the_same_for_all_and_fits(max_length):
    """Every length, so that cuts fall inside words, white space, and characters of several tokens."""
    models = [chatml(), gemma(), plain()]
    pair = PreferencePair(say("hello"), LONG, "no " + LONG)
    done = tokenize_pair(pair, models, max_length)
    assert done.cut == (True, True)
    policy = done.tokens[0]
    room = max_length - len(policy.prompt_ids)
    for full, cut, field in (
        (LONG, done.pair.chosen, "chosen_ids"),
        ("no " + LONG, done.pair.rejected, "rejected_ids"),
    ):
        assert full.startswith(cut)
        for model, tokens in zip(models, done.tokens, strict=True):
            assert text_of(model, getattr(tokens, field)) == cut, "the whole cut text, without an end of turn"
        # At most the 4 byte tokens of one character are given up.
        assert room - 4 <= len(policy.__dict__[field]) <= room


def test_responses_are_cut_independently():
    done = tokenize_pair(PreferencePair(say("hello"), LONG, "dog"), [chatml(), gemma()], 60)
    assert done.cut == (True, False)
    assert done.pair.rejected == "dog"
    assert [text_of(m, t.rejected_ids) for m, t in zip([chatml(), gemma()], done.tokens, strict=True)] == [
        "dog<|im_end|>",
        "dog<end_of_turn>",
    ]


def test_no_room_for_the_end_of_turn_is_a_cut_that_loses_no_text():
    model = chatml()
    (whole,) = tokenize_pair(PAIR, [model], None).tokens
    fits = len(whole.prompt_ids) + len(whole.chosen_ids)
    assert tokenize_pair(PAIR, [model], fits).cut[0] is False
    done = tokenize_pair(PAIR, [model, gemma()], fits - 1)
    assert (done.cut[0], done.pair.chosen) == (True, PAIR.chosen)
    assert done.tokens[0].chosen_ids == whole.chosen_ids[:-1]
    assert text_of(gemma(), done.tokens[1].chosen_ids) == PAIR.chosen


# ---- bad rows --------------------------------------------------------------------------------------------------------

PROMPT_TOKENS = len(chatml().prompt_ids(PAIR))
BAD_ROWS = {
    "empty_response": (PreferencePair(say("q"), "a", " \n"), [chatml()], None),
    "identical_responses": (PreferencePair(say("q"), "a", "a"), [chatml()], None),
    "identical_responses after cutting": (
        PreferencePair(say("hello"), LONG + "x", LONG + "y"),
        [chatml()],
        PROMPT_TOKENS + 9,
    ),
    "empty_prompt": (PreferencePair("", "a", "b"), [plain(), chatml("ref")], None),
    "prompt_too_long": (PAIR, [chatml()], PROMPT_TOKENS),
    "prompt_too_long for a character": (PreferencePair(say("hello"), "日本", "語"), [chatml()], PROMPT_TOKENS + 1),
    "prompt_too_long for more than white space": (
        PreferencePair(say("hello"), "\n" + LONG, "dog"),
        [chatml()],
        PROMPT_TOKENS + 1,
    ),
    "context_exceeded:small": (
        PreferencePair(say("hello"), LONG, "b"),
        [chatml(), gemma("small", max_context=70)],
        None,
    ),
    "template_rejected:gemma": (
        PreferencePair([{"role": "assistant", "content": "I begin"}, *say("hello")], "a", "b"),
        [chatml(), gemma(system="merge")],
        None,
    ),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows(reason):
    pair, models, max_length = BAD_ROWS[reason]
    with pytest.raises(BadRow) as bad:
        tokenize_pair(pair, models, max_length)
    assert bad.value.reason == reason.split()[0]


def test_bad_rows_are_bad_by_a_hair():
    """One token more room, or one more position, and the row is good."""
    assert tokenize_pair(PAIR, [chatml()], PROMPT_TOKENS + 1).cut == (True, True)
    pair = PreferencePair(say("hello"), LONG, "b")
    (tokens,) = tokenize_pair(pair, [gemma()], None).tokens
    needed = len(tokens.prompt_ids) + len(tokens.chosen_ids)
    tokenize_pair(pair, [gemma(max_context=needed)], None)
    with pytest.raises(BadRow, match=f"context_exceeded:gemma: {needed} tokens, its context is {needed - 1}"):
        tokenize_pair(pair, [gemma(max_context=needed - 1)], None)
    # The responses do not add up: each is read after the prompt.
    tokenize_pair(PreferencePair(say("hello"), LONG, LONG + "!"), [gemma(max_context=needed + 1)], None)


# ---- whole data sets -------------------------------------------------------------------------------------------------

STRINGS, CHAT = LAYOUTS["strings"], LAYOUTS["conversational"]
MODELS = [chatml(), gemma("ref", system="merge")]


def chat_row(prompt, chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": say("", chosen)[1:], "rejected": say("", rejected)[1:]}


def chat_rows(tmp_path):
    """Six rows, numbers 1 (identical), 2 (a user answers) and 4 (empty) bad; 3 has a system turn, 5 is long."""
    rows = [
        chat_row(say("hello")),
        chat_row(say("hello"), "same", "same"),
        {**chat_row(say("hello")), "chosen": say("x", "y")},
        chat_row(WITH_SYSTEM.prompt),
        chat_row(say("hello"), ""),
        chat_row(say("hello"), LONG),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))


def prepare(rows, layout=CHAT, texts=MODELS, **options):
    return prepare_pairs(rows, layout, texts, **{"max_length": 80, "max_bad_rows": 1.0, **options})


@pytest.mark.parametrize("num_proc", [None, pytest.param(2, marks=pytest.mark.processes)])
def test_prepare_pairs(tmp_path, caplog, num_proc):
    rows, listed = chat_rows(tmp_path), tmp_path / "out" / "bad.jsonl"
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        pairs = prepare(rows, bad_rows_file=listed, num_proc=num_proc)
    assert (len(pairs), pairs.num_texts, pairs.truncated, pairs.merged) == (3, 2, 1, {"ref": 1})
    assert pairs.counts == {"identical_responses": 1, "malformed": 1, "empty_response": 1}
    assert [pairs.source_row(i) for i in range(3)] == [0, 3, 5]
    for i, row in enumerate((0, 3, 5)):
        expected = tokenize_pair(CHAT.to_pair(rows[row]), MODELS, 80)
        assert pairs.tokens(i) == pairs[i] == expected.tokens
        assert all(isinstance(tokens, PairTokens) for tokens in pairs[i])
        assert (pairs.pair(i), pairs.cut(i)) == (expected.pair, expected.cut)
    assert pairs.cut(2) == (True, False)
    assert [json.loads(line) for line in listed.read_text().splitlines()] == [
        {
            "split": "train",
            "row": 1,
            "reason": "identical_responses",
            "detail": "chosen and rejected are the same text",
        },
        {"split": "train", "row": 2, "reason": "malformed", "detail": "`chosen` answers with a user turn"},
        {"split": "train", "row": 4, "reason": "empty_response", "detail": "chosen has no text"},
    ]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("mrpo_scale")] == [
        "train: skipped 3 of 6 pairs: 1 identical_responses, 1 malformed, 1 empty_response",
        "train: cut responses of 1 pairs to max_length 80",
        "train: 1 pair: merged turns of prompts, for ref",
    ]


def test_only_the_writing_process_writes(tmp_path, caplog):
    listed = tmp_path / "bad.jsonl"
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        prepare(chat_rows(tmp_path), bad_rows_file=listed, write=False)
    assert not listed.exists()
    assert not [record for record in caplog.records if record.name.startswith("mrpo_scale")]


def test_no_file_when_no_row_is_bad(tmp_path):
    prepare(chat_rows(tmp_path).select([0, 5]), bad_rows_file=tmp_path / "bad.jsonl")
    assert not (tmp_path / "bad.jsonl").exists()


def test_rows_of_a_selection_keep_the_numbers_of_the_file(tmp_path):
    pairs = prepare(chat_rows(tmp_path).select([5, 1, 0]))
    assert [pairs.source_row(i) for i in range(len(pairs))] == [5, 0]
    assert [row["row"] for row in pairs.bad_rows()] == [1]
    assert pairs.pair(1).chosen == "good"


def test_bad_rows_stop_the_run(tmp_path):
    rows, listed = chat_rows(tmp_path), tmp_path / "bad.jsonl"
    with pytest.raises(ConfigError, match=r"`on_bad_row: error`: row 1 of the train set is bad: identical_responses"):
        prepare(rows, on_bad_row="error", bad_rows_file=listed)
    assert len(listed.read_text().splitlines()) == 3, "listed before the run stops"
    assert len(prepare(rows, max_bad_rows=0.5)) == 3, "exactly max_bad_rows is allowed"
    with pytest.raises(ConfigError, match=r"`max_bad_rows: 0.49`: 3 of 6 pairs .* 1 empty_response; repair the data"):
        prepare(rows, max_bad_rows=0.49)
    with pytest.raises(ConfigError, match=r"6 of 6 pairs of the train set .* prompt_too_long; raise `max_length: 5`"):
        prepare(rows.select([0] * 6), max_length=5)


def test_a_template_that_rejects_the_data_stops_the_run(tmp_path):
    with pytest.raises(ConfigError, match="`system: native`: gemma's chat template rejects"):
        prepare(chat_rows(tmp_path), texts=[chatml(), gemma()])


# ---- cache keys ------------------------------------------------------------------------------------------------------

STRING_ROWS = [{"prompt": "hello", "chosen": f"good {i}", "rejected": "bad"} for i in range(4)]


def test_what_the_cache_key_depends_on(tmp_path):
    """Everything that changes tokens or verdicts changes it; the same inputs, built anew, do not."""
    rows = datasets.Dataset.from_list(STRING_ROWS)

    def key(rows=rows, layout=STRINGS, texts=None, max_length=80):
        return prepare(rows, layout, texts or [chatml(), plain()], max_length=max_length).fingerprint

    other_plain = ModelText(tiny(280, bos=True), name="plain", max_context=None, plain_template="Q: " + CHATML)
    one_word = [*STRING_ROWS[:-1], {**STRING_ROWS[-1], "chosen": "good 4"}]
    keys = {
        "same": key(),
        "max_length": key(max_length=81),
        "no max_length": key(max_length=None),
        "text": key(datasets.Dataset.from_list(one_word)),
        "rows": key(rows.select([3, 1, 2, 0])),
        "order of models": key(texts=[plain(), chatml()]),
        "one model": key(texts=[chatml()]),
        "name": key(texts=[chatml("other"), plain()]),
        "context": key(texts=[chatml(max_context=99), plain()]),
        "template": key(texts=[chatml(chat_template=CHATML.replace("\n", "\n\n")), plain()]),
        "own template": key(texts=[view(template=CHATML + " "), plain()]),
        "plain template": key(texts=[chatml(), other_plain]),
        "system": key(texts=[chatml(system="merge"), plain()]),
        "vocabulary": key(texts=[chatml(vocab=301), plain()]),
        "merges": key(texts=[chatml(corpus=["something else entirely, much else"] * 9), plain()]),
        "bos": key(texts=[chatml(bos=True), plain()]),
        "eos": key(texts=[chatml(eos="<end_of_turn>"), plain()]),
    }  # fmt: skip
    assert len(set(keys.values())) == len(keys), "two different inputs share a key"
    assert keys["same"] == key()


def test_fingerprint_ignores_what_the_last_call_left_in_the_tokenizer():
    tokenizer = tiny(template=CHATML)
    before = ModelText(tokenizer, name="a", max_context=None).fingerprint()
    tokenizer.pad_token = "</s>"
    changed = ModelText(tokenizer, name="a", max_context=None).fingerprint()
    same = ModelText(tokenizer, name="b", max_context=7)
    tokenizer("a b", padding="max_length", truncation=True, max_length=9)
    assert same.fingerprint() == changed
    assert before != changed, "special tokens count"


def test_fingerprint_follows_a_template_that_prints_the_date():
    templates = ["{{ '%s ' }}" % day + CHATML for day in ("Monday", "Tuesday")]  # noqa: UP031 (braces are Jinja's)
    first, second = (view(template=template).fingerprint() for template in templates)
    assert first != second


def test_cache_is_read_for_the_same_inputs_and_written_anew_for_others(tmp_path, monkeypatch):
    rows, cache = datasets.Dataset.from_list(STRING_ROWS), tmp_path / "cache"
    first = prepare(rows, STRINGS, cache_dir=cache)
    assert [path.name for path in cache.iterdir()] == [f"pairs-{first.fingerprint}.arrow"]

    def must_not_run(*args, **kwargs):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr("mrpo_scale.data.token_table.tokenize_pair", must_not_run)
        again = prepare(rows, STRINGS, cache_dir=cache)
        with pytest.raises(AssertionError, match="tokenized again"):
            prepare(rows, STRINGS, cache_dir=cache, max_length=81)
    assert [again[i] for i in range(4)] == [first[i] for i in range(4)]
    shorter = prepare(rows, STRINGS, cache_dir=cache, max_length=4)
    assert len(list(cache.iterdir())) == 2
    assert shorter[0] != first[0]


def test_tokens_live_in_arrow_not_in_python(tmp_path):
    pairs = prepare(datasets.Dataset.from_list(STRING_ROWS), STRINGS, cache_dir=tmp_path)
    assert pairs._tokenized.cache_files, "memory-mapped from the cache file"
    assert pairs._tokenized.features["chosen_ids_1"] == datasets.List(datasets.Value("int32"))


# ------------------------------------------------------------------------------------------------- keys of rows in the score cache


def test_a_row_key_follows_the_scored_text_and_its_cuts():
    """Lengths keep neighbours apart, and "A B" whole is not "A B C" cut to "A B": only one of them scores an end of turn."""
    whole = PreferencePair([{"role": "user", "content": "q"}], "A B", "C")
    others = [
        replace(whole, prompt=[{"role": "user", "content": "Q"}]),
        replace(whole, prompt="q"),
        replace(whole, chosen="A"),
        replace(whole, chosen="A BC", rejected=""),
        replace(whole, chosen="C", rejected="A B"),
        replace(whole, tools=[{"name": "t"}]),
    ]
    keys = [row_key(pair) for pair in [whole, *others]]
    cut = Cut(1, 3)
    keys += [row_key(whole, cuts) for cuts in ((cut, None), (None, cut), (cut, cut))]
    assert len(set(keys)) == len(keys) == 10 and {len(key) for key in keys} == {16}
    assert row_key(replace(whole)) == keys[0]
    # As earlier versions made them: their score caches stay valid.
    assert [keys[i].hex() for i in (0, 7, 9)] == [
        "50df92b77ecbffcbc11c3e72aa368f53",
        "1c348a8232a31c745e8c175fc0024741",
        "c18ec5e46b6d3387d30c3f3c0f07d06d",
    ]


def test_max_length_changes_the_keys_of_the_rows_that_it_cuts(tmp_path):
    """Two rows that fit either way keep their keys, the long one does not; the keys do not depend on the models."""
    rows = datasets.Dataset.from_list(
        [chat_row("hello"), chat_row("hello", chosen=LONG), chat_row("how", "fine", "no")]
    )
    long, short = (prepare(rows, max_length=n) for n in (None, 60))
    assert [short.cut(row) for row in range(3)] == [(False, False), (True, False), (False, False)]
    assert (long.row_keys != short.row_keys).tolist() == [False, True, False]
    alone = prepare(rows, texts=MODELS[:1], max_length=60)
    assert (alone.row_keys == short.row_keys).all()
