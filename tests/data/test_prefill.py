"""Prompts that end with an assistant turn: what is scored, by hand; cuts, bad rows, and what is said of them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import run_command
from mrpo_scale.data import LAYOUTS, BadRow, PairOptions, PreferencePair
from mrpo_scale.data.pairs import Cut
from mrpo_scale.data.tokenization import ModelText, row_key, tokenize_pair
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from tests.data.test_brought_rows import prepare
from tests.data.test_brought_rows import said as remarks_of
from tests.data.test_chat_templates import DEEPSEEK_R1, QWEN3, QWQ
from tests.data.test_chat_templates import model as thinking_model
from tests.tiny import CHATML
from tests.tool_templates import TOOLS, assistant, call, result, tool_tokenizer, user, write_tool_models

PREFIX = "one two"
PROMPT = [user("red or blue?"), assistant(PREFIX)]
PAIR = PreferencePair(PROMPT, " three four", " fox")
#: By hand: the prompt's end, what is scored of chosen and rejected. The blank before the prefix is Mistral's.
EXPECTED = {
    CHATML: ("<|im_start|>assistant\none two", " three four<|im_end|>", " fox<|im_end|>"),
    "llama": ("<|head|>assistant<|/head|>\n\none two", " three four<|eot|>", " fox<|eot|>"),
    "mistral": ("[INST] red or blue?[/INST] one two", " three four</s>", " fox</s>"),
    "gpt_oss": (
        "<|start|>assistant<|channel|>final<|message|>one two",
        " three four<|return|>",
        " fox<|return|>",
    ),
    None: ("\n\nAssistant: one two", " three four</s>", " fox</s>"),
}


def model(template, name="policy", **options):
    return ModelText(tool_tokenizer(template), name=name, max_context=None, **options)


def texts_of(text, tokens):
    assert tokens.chosen_context == tokens.rejected_context == []
    return [text.tokenizer.decode(ids) for ids in (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)]


def read(text, pair=PAIR, max_length=None):
    (tokens,) = tokenize_pair(pair, [text], max_length).tokens
    return texts_of(text, tokens)


@pytest.mark.parametrize("template", EXPECTED)
def test_the_responses_own_text_is_scored(template):
    text = model(template)
    prompt, *responses = read(text)
    end, *expected = EXPECTED[template]
    assert prompt.endswith(end)
    assert responses == expected
    # What a model that shall continue gets is the same prompt, token by token.
    (tokens,) = tokenize_pair(PAIR, [text], None).tokens
    assert text.prompt_ids(PAIR) == tokens.prompt_ids
    # Prompt and response are the template's own rendering of the turn as one.
    whole = text._template.render([PROMPT[0], assistant(PREFIX + PAIR.chosen)], generation_prompt=False)
    assert (prompt + responses[0]).removesuffix("</s>").endswith(whole.rstrip("\n").removesuffix("</s>"))


@pytest.mark.parametrize("template", ["llama", CHATML])
def test_the_prompt_is_that_of_transformers(template):
    text = model(template)
    expected = text.tokenizer.apply_chat_template(PROMPT, continue_final_message=True, tokenize=False)
    assert text.render_prompt(PAIR) == expected


@pytest.mark.parametrize("template", EXPECTED)
def test_a_prompt_may_end_within_a_word_or_with_a_blank(template):
    """No token spans the place, as when a model generates; white space that a template would trim at a turn's end stays."""
    text = model(template)
    for prefix, response in (("one t", "wo three"), ("one ", "two"), ("one", " two"), ("one\n", " two")):
        prompt, chosen, _ = read(text, PreferencePair([PROMPT[0], assistant(prefix)], response, "x"))
        assert prompt.endswith(prefix)
        assert chosen.startswith(response)


@pytest.mark.parametrize("template", EXPECTED)
def test_a_cut_counts_characters_of_the_response_alone(template):
    text, other = model(template), model("llama" if template != "llama" else CHATML, "other")
    pair = PreferencePair(PROMPT, " the quick brown fox jumps", " fox")
    (whole,) = tokenize_pair(pair, [text], None).tokens
    done = tokenize_pair(pair, [text, other], len(whole.prompt_ids) + len(whole.rejected_ids))
    kept = done.pair.chosen
    assert pair.chosen.startswith(kept) and done.cuts == (Cut(1, len(kept)), None)
    for reader, tokens in zip((text, other), done.tokens, strict=True):
        prompt, chosen, _ = texts_of(reader, tokens)
        assert prompt.endswith(PREFIX) and chosen == kept
    assert done.tokens[0].chosen_ids == whole.chosen_ids[: len(done.tokens[0].chosen_ids)]
    with pytest.raises(BadRow, match="prompt_too_long"):
        tokenize_pair(pair, [text], len(whole.prompt_ids))


def test_a_prefilled_row_has_a_key_of_its_own():
    joined = PreferencePair(PROMPT[:1], PREFIX + " three four", PREFIX + " fox")
    assert row_key(PAIR) != row_key(joined)


def test_merged_turns_are_continued_as_one():
    """A template that takes no two turns of one role: `system: merge` joins them, and the responses continue what is joined."""
    pair = PreferencePair([user("red?"), assistant("fox"), PROMPT[1]], " a", " b")
    with pytest.raises(ConfigError, match="turns must alternate; set `system: merge`"):
        read(model("mistral"), pair)
    merging = model("mistral", system="merge")
    assert read(merging, pair) == ["<s>[INST] red?[/INST] fox\n\none two", " a</s>", " b</s>"]
    assert merging.render_prompt(pair) == "<s>[INST] red?[/INST] fox\n\none two"


# ---- reasoning -------------------------------------------------------------------------------------------------------------


def test_reasoning_templates():
    """A prefix that begins the reasoning stays where the template keeps it; one that drops or moves it leaves the pair out."""
    inside = PreferencePair([user("hello"), assistant("<think>\nhow")], " quick\n</think>\n\nfox", "</think>\n\ndog")
    text = thinking_model(QWQ)
    prompt, chosen, rejected = read(text, inside)
    assert prompt.endswith("<|im_start|>assistant\n<think>\nhow")
    assert (chosen, rejected) == (" quick\n</think>\n\nfox<|im_end|>", "</think>\n\ndog<|im_end|>")
    for template in (QWEN3, DEEPSEEK_R1):
        with pytest.raises(BadRow) as bad:
            read(thinking_model(template, "ref"), inside)
        assert bad.value.reason == "template_rejected:ref"
        assert (
            bad.value.detail
            == "it writes the assistant turn that ends the prompt otherwise once a response continues it"
        )
    # All of the reasoning stands in the prompt: Qwen3's keeps it, R1's drops it.
    thought = PreferencePair([user("hello"), assistant("<think>\nhow\n</think>\n\nthe")], " fox", " dog")
    assert read(thinking_model(QWEN3), thought)[0].endswith("<think>\nhow\n</think>\n\nthe")
    assert read(thinking_model(QWEN3), thought)[1:] == [" fox<|im_end|>", " dog<|im_end|>"]
    with pytest.raises(
        BadRow, match="template_rejected:ref: it drops or rewrites the assistant turn that ends the prompt"
    ):
        read(thinking_model(DEEPSEEK_R1, "ref"), thought)


def test_reasoning_in_a_field_of_the_turn_is_prompt():
    pair = PreferencePair([PROMPT[0], assistant("", reasoning_content="how slow")], "red", "blue")
    prompt, *responses = read(model("qwen"), pair)
    assert prompt.endswith("<|im_start|>assistant\n<think>\nhow slow\n</think>\n\n")
    assert responses == ["red<|im_end|>", "blue<|im_end|>"]


# ---- bad rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "chosen", "why"),
    [
        ([*PROMPT[:1], call("red")], " a", "calls tools"),
        ([*PROMPT[:1], assistant(" ")], " a", "says nothing"),
        (PROMPT[1:], " a", "nothing that it answers"),
        (PROMPT, [call("red"), result("slow"), assistant("red")], "nothing says whether its first turn continues"),
        (
            PROMPT,
            [assistant(" three"), user("why?"), assistant("four")],
            "nothing says whether its first turn continues",
        ),
    ],
)
def test_what_cannot_be_continued_is_malformed(prompt, chosen, why):
    with pytest.raises(BadRow, match=why) as bad:
        tokenize_pair(PreferencePair(prompt, chosen, " b", TOOLS), [model("qwen")], None)
    assert bad.value.reason == "malformed"


def test_whole_conversations_with_two_assistant_turns_in_a_row_stay_malformed():
    """Nothing in such a row says where its responses begin: data sets write that by mistake."""
    row = {side: [*PROMPT, assistant(text)] for side, text in (("chosen", " three"), ("rejected", " four"))}
    with pytest.raises(
        BadRow, match="malformed: an assistant turn follows an assistant turn, in a row without a prompt"
    ):
        LAYOUTS["conversational"].to_pair(row)
    pair = LAYOUTS["conversational"].to_pair({"prompt": PROMPT, **{side: row[side][2:] for side in row}})
    assert pair == PreferencePair(PROMPT, " three", " four")


# ---- whole sets ------------------------------------------------------------------------------------------------------------


def rows_of(pairs):
    return [{"prompt": p.prompt, "chosen": [assistant(p.chosen)], "rejected": [assistant(p.rejected)]} for p in pairs]


def test_responses_that_begin_with_the_text_they_continue_are_said_and_stripped():
    whole = PreferencePair(PROMPT, PREFIX + PAIR.chosen, PREFIX + PAIR.rejected)
    kept = prepare(rows_of([PAIR, whole]), [model(CHATML)], options=PairOptions(repeated_prompt="keep"))
    assert remarks_of(kept) == {"prefilled": {"policy": 2}, "repeated_prompt": 1}
    stripped = prepare(rows_of([whole]), [model(CHATML)], options=PairOptions(repeated_prompt="strip"))
    assert stripped.pair(0) == PAIR and stripped.tokens(0) == tokenize_pair(PAIR, [model(CHATML)], None).tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_tool_models(tmp_path_factory.mktemp("models"))


def logps_by_hand(folder, pair):
    """Of both responses by a plain forward in float64 on the rendered text: prefix and end of turn placed here, by hand."""
    tok = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for response in (pair.chosen, pair.rejected):
        text = tok.apply_chat_template([*pair.prompt[:-1], assistant(PREFIX + response)], tokenize=False).rstrip("\n")
        encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        start = text.rindex(PREFIX + response) + len(PREFIX)
        ids = torch.tensor(encoded["input_ids"])
        with torch.no_grad():
            logps = plain(ids[None]).logits[0].log_softmax(-1)
        own = [i for i, (begin, _) in enumerate(encoded["offset_mapping"]) if begin >= start]
        found.append(sum(logps[i - 1, ids[i]].item() for i in own))
    return found


@pytest.mark.parametrize("template", ["llama", "mistral"])
def test_log_probs_are_those_of_a_plain_forward(folders, template):
    pairs = [PAIR, PreferencePair([user("why?"), assistant("one"), user("red?"), PROMPT[1]], " the fox", " jumps")]
    text = ModelText(AutoTokenizer.from_pretrained(folders[template]), name="policy", max_context=None)
    expected = torch.tensor([logps_by_hand(folders[template], pair) for pair in pairs], dtype=torch.float64)
    scorer = AutoModelForCausalLM.from_pretrained(folders[template], dtype=torch.float32).eval()
    enable_pair_scoring(scorer, template, "torch")
    tokens = [tokenize_pair(pair, [text], None).tokens[0] for pair in pairs]
    for shared in (True, False):
        with torch.no_grad():
            found = score_pairs(scorer, collate_pairs(tokens, shared_prompt=shared))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_mrpo_check_reads_such_a_file(folders, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    pairs = [PreferencePair([user(f"{i} red?"), assistant(PREFIX)], f" three {i}", f" fox {i}") for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(pairs)))
    words = ["--model_name_or_path", folders["llama"], "--ref_models", folders["mistral"], "--dataset_name", str(data)]
    words += ["--output_dir", str(tmp_path / "out"), "--gpu", "cpu", "--gpus", "1", "--use_cpu", "true"]
    run_command("check", words)
    out = capsys.readouterr().out
    assert "12 pairs: the responses continue the assistant turn that ends the prompt, for" in out
    assert "one two" in out and "malformed" not in out
