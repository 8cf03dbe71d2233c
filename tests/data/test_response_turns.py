"""Responses of several turns and of tool calls: which tokens are the assistant's, by four templates; cuts, keys and bad rows."""

import json
import logging
from itertools import pairwise

import datasets
import pytest

from mrpo_scale.data import LAYOUTS, BadRow, PreferencePair, find_layout, parse_datasets
from mrpo_scale.data.loading import load_rows
from mrpo_scale.data.messages import as_text, said
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.pairs import Cut
from mrpo_scale.data.tokenization import ModelText, row_key, tokenize_pair
from tests.tiny import CHATML
from tests.tool_templates import CHOSEN, PROMPT, REJECTED, TOOLS, assistant, call, result, rows, tool_tokenizer, user

PAIR = PreferencePair(PROMPT, CHOSEN, REJECTED, TOOLS)


def model(template, name=None, **options):
    return ModelText(tool_tokenizer(template), name=name or template, max_context=None, **options)


def read(template, pair, max_length=None):
    text = model(template)
    (tokens,) = tokenize_pair(pair, [text], max_length).tokens
    return text, tokens


def parts(text, tokens, side="chosen"):
    """The response as texts that are scored and texts that are not, in turn."""
    ids, context = getattr(tokens, f"{side}_ids"), getattr(tokens, f"{side}_context")
    return [text.tokenizer.decode(ids[a:b]) for a, b in pairwise([0, *context, len(ids)])]


#: By hand: what the assistant writes, and between that what it reads.
EXPECTED = {
    "qwen": [
        '<tool_call>\n{"name": "look_up", "arguments": {"word": "red"}}\n</tool_call><|im_end|>',
        '\n<|im_start|>user\n<result>\nred is "slow"\n</result><|im_end|>\n<|im_start|>assistant\n',
        '<tool_call>\n{"name": "look_up", "arguments": {"word": "blue"}}\n</tool_call><|im_end|>',
        "\n<|im_start|>user\n<result>\nblue is fast\n</result><|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nblue<|im_end|>",
    ],
    "llama": [
        '{"name": "look_up", "parameters": {"word": "red"}}<|eot|>',
        '<|head|>ipython<|/head|>\n\n"red is \\"slow\\""<|eot|><|head|>assistant<|/head|>\n\n',
        '{"name": "look_up", "parameters": {"word": "blue"}}<|eot|>',
        '<|head|>ipython<|/head|>\n\n"blue is fast"<|eot|><|head|>assistant<|/head|>\n\n',
        "blue<|eot|>",
    ],
    "mistral": [
        '[CALLS] [{"name": "look_up", "arguments": {"word": "red"}}]</s>',
        '[RESULTS] {"content": "red is \\"slow\\""}[/RESULTS]',
        '[CALLS] [{"name": "look_up", "arguments": {"word": "blue"}}]</s>',
        '[RESULTS] {"content": "blue is fast"}[/RESULTS]',
        " blue</s>",
    ],
    "gpt_oss": [
        ' to=functions.look_up<|channel|>commentary<|message|>{"word": "red"}<|call|>',
        '<|start|>functions<|message|>red is "slow"<|end|><|start|>assistant',
        ' to=functions.look_up<|channel|>commentary<|message|>{"word": "blue"}<|call|>',
        "<|start|>functions<|message|>blue is fast<|end|><|start|>assistant",
        "<|channel|>final<|message|>blue<|return|>",
    ],
}
#: Where the template writes the tools is the prompt's affair; what a rejected response of one turn becomes.
ENDS = {
    "qwen": ("<|im_start|>assistant\n", "<think>\n\n</think>\n\nno<|im_end|>"),
    "llama": ("<|head|>assistant<|/head|>\n\n", "no<|eot|>"),
    "mistral": ("[INST] red or blue?[/INST]", " no</s>"),
    "gpt_oss": ("<|start|>assistant", "<|channel|>final<|message|>no<|return|>"),
}


@pytest.mark.parametrize("template", EXPECTED)
def test_the_scored_tokens_are_exactly_the_assistants(template):
    text, tokens = read(template, PAIR)
    end, rejected = ENDS[template]
    assert text.tokenizer.decode(tokens.prompt_ids).endswith(end)
    assert parts(text, tokens) == EXPECTED[template]
    assert parts(text, tokens, "rejected") == [rejected]
    # Nothing but the template's own rendering, up to the last end of turn.
    whole = text._template.render([*PROMPT, *CHOSEN], TOOLS, generation_prompt=False)
    assert text.tokenizer.decode(tokens.prompt_ids + tokens.chosen_ids) == whole.rstrip("\n")
    assert tokens.scored_lengths[0] == sum(len(text.tokenizer.tokenize(part)) for part in EXPECTED[template][::2])


@pytest.mark.parametrize("template", EXPECTED)
def test_one_turn_that_calls_a_tool(template):
    text, tokens = read(template, PreferencePair(PROMPT, [call("red")], REJECTED, TOOLS))
    assert parts(text, tokens) == EXPECTED[template][:1]
    # Qwen's writes its empty think block before both last turns now: it is prompt.
    assert parts(text, tokens, "rejected") == [ENDS[template][1].removeprefix("<think>\n\n</think>\n\n")]


def test_a_turn_with_text_and_two_calls():
    two = [*call("red")["tool_calls"], *call("blue")["tool_calls"]]
    pair = PreferencePair(
        PROMPT, [call("red", "Let me look.", tool_calls=two), result("a"), result("b"), assistant("one")], "no"
    )
    text, tokens = read("qwen", pair)
    calls = [
        f'<tool_call>\n{{"name": "look_up", "arguments": {{"word": "{word}"}}}}\n</tool_call>'
        for word in ("red", "blue")
    ]
    assert parts(text, tokens) == [
        "\n".join(["Let me look.", *calls]) + "<|im_end|>",
        "\n<|im_start|>user\n<result>\na\n</result>\n<result>\nb\n</result><|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\none<|im_end|>",
    ]
    with pytest.raises(BadRow, match="template_rejected:llama: one call at a time"):
        read("llama", pair)


#: User turns between: the template rewrites history there (a reasoning of earlier turns is dropped, tools move to the last user).
SEVERAL = [
    assistant("maybe four", reasoning_content="how slow"),
    user("red?"),
    assistant("yes", reasoning_content="how fast"),
]


def test_what_a_template_makes_of_earlier_turns_is_scored_and_counted(caplog):
    pair = PreferencePair(PROMPT, SEVERAL, [assistant("no"), user("red?"), assistant("yes")], TOOLS)
    text, tokens = read("qwen", pair)
    between = "\n<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n"
    assert parts(text, tokens) == ["maybe four<|im_end|>", between, "<think>\nhow fast\n</think>\n\nyes<|im_end|>"]
    assert parts(text, tokens, "rejected") == ["no<|im_end|>", between, "<think>\n\n</think>\n\nyes<|im_end|>"]
    row = {"prompt": PROMPT, "chosen": SEVERAL, "rejected": pair.rejected, "tools": TOOLS}
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        found = prepare([row], [model("qwen")])
    assert found.changed == {"qwen": 1}
    assert "train: 1 pair: the chat template drops or rewrites text of responses" in caplog.text


def test_a_prompt_that_the_template_rewrites_is_context_where_the_two_conversations_part():
    """Mistral's tools stand before the last user turn: in the prompt of the rejected response, in the chosen one's second turn."""
    text, tokens = read(
        "mistral", PreferencePair(PROMPT, [assistant("maybe"), user("red?"), assistant("yes")], "no", TOOLS)
    )
    tools = text._template.render(PROMPT, TOOLS, generation_prompt=False).partition("[INST]")[0].removeprefix("<s>")
    assert text.tokenizer.decode(tokens.prompt_ids) == "<s>"
    assert parts(text, tokens) == [
        "",
        "[INST] red or blue?[/INST]",
        " maybe</s>",
        f"{tools}[INST] red?[/INST]",
        " yes</s>",
    ]
    assert parts(text, tokens, "rejected") == ["", f"{tools}[INST] red or blue?[/INST]", " no</s>"]


def test_templates_without_a_special_end_of_turn():
    """The plain template: what stands between the turns is context, and only the last one ends with the eos token."""
    pair = PreferencePair(PROMPT, [assistant("maybe"), user("red?"), assistant("yes")], "no")
    text, tokens = read(None, pair)
    # Its generation prompt ends with a blank, which the text alone would make one token with the answer.
    assert parts(text, tokens) == ["maybe", "\n\nHuman: red?\n\nAssistant: ", "yes</s>"]


# ---- what a template does not know -----------------------------------------------------------------------------------------


def prepare(examples, texts, **options):
    found = datasets.Dataset.from_list(examples)
    return prepare_pairs(found, find_layout(found), texts, **{"max_length": None, "max_bad_rows": 1.0, **options})


@pytest.mark.parametrize(
    ("template", "chosen", "why"),
    [
        ("no_tools", [call("red")], "it drops tool calls of responses"),
        (
            "no_tools",
            [call("red", "Let me look."), result("slow"), assistant("red")],
            "it drops tool turns of responses",
        ),
        (CHATML, [call("red", "Let me look."), result("slow"), assistant("red")], "it drops tool calls of responses"),
        ("mistral", [assistant("a"), assistant("b")], "turns must alternate"),
        (None, [call("red"), result("slow"), assistant("red")], ""),
    ],
)
def test_a_template_that_does_not_know_tools_leaves_the_pair_out_for_all(template, chosen, why):
    with pytest.raises(BadRow) as bad:
        tokenize_pair(PreferencePair(PROMPT, chosen, "no"), [model("qwen"), model(template, "ref")], None)
    assert bad.value.reason == "template_rejected:ref"
    assert why in bad.value.detail


def test_tools_that_a_template_leaves_out_of_prompts_are_counted_and_said(caplog):
    history = [*PROMPT, call("red", "Let me look."), result("slow")]
    examples = [
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")], "tools": TOOLS},
        {"prompt": history, "chosen": [assistant("b")], "rejected": [assistant("c")], "tools": None},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")], "tools": None},
    ]
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        found = prepare(examples, [model("qwen"), model("no_tools", "ref")])
    assert (len(found), found.no_tools) == (3, {"ref": 2})
    assert (
        "train: 2 pairs: the chat template leaves tools, tool calls or tool results out of prompts, of ref"
        in caplog.text
    )


# ---- cuts --------------------------------------------------------------------------------------------------------------------


def length(template, chosen):
    _, tokens = read(template, PreferencePair(PROMPT, chosen, REJECTED, TOOLS))
    return len(tokens.prompt_ids) + len(tokens.chosen_ids)


LONG = [
    call("red"),
    result("slow"),
    assistant("one two three four five six seven"),
    user("why?"),
    assistant("eight nine"),
]


@pytest.mark.parametrize("other", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize(
    ("room", "messages", "characters"),
    [
        (0, None, None),  # all of it
        (-1, 5, len("eight nine")),  # no end of turn
        (-2, 5, None),  # less of the last text
        ("user", 3, None),  # the last turn goes with what the user said before it
        ("call", 1, None),
    ],
)
def test_later_turns_go_first_and_every_model_reads_the_same_conversation(other, room, messages, characters):
    pair = PreferencePair(PROMPT, LONG, REJECTED, TOOLS)
    if room == "user":
        most = length("qwen", LONG[:3])
    elif room == "call":
        most = length("qwen", LONG[:1]) + 3
    else:
        most = length("qwen", LONG) + room
    models = [model("qwen"), model(other)]
    done = tokenize_pair(pair, models, most)
    assert done.cut == (messages is not None, False)
    assert len(done.tokens[0].prompt_ids) + len(done.tokens[0].chosen_ids) <= most
    cut = done.cuts[0]
    if messages is None:
        assert done.pair == pair
        return
    assert cut.messages == messages
    if room in ("user", "call"):
        # A conversation of its own, with its end of turn.
        expected = tokenize_pair(PreferencePair(PROMPT, LONG[:messages], REJECTED, TOOLS), models, None)
        assert (cut.characters, done.pair, done.tokens) == (None, expected.pair, expected.tokens)
        return
    assert characters in (None, cut.characters) and 0 < cut.characters <= len("eight nine")
    assert done.pair.chosen == [*LONG[:4], assistant("eight nine"[: cut.characters])]
    for text, tokens in zip(models, done.tokens, strict=True):
        assert parts(text, tokens)[-1].endswith("eight nine"[: cut.characters])
        (whole,) = tokenize_pair(pair, [text], None).tokens
        assert parts(text, tokens)[:-1] == parts(text, whole)[:-1]


def test_a_cut_within_the_first_turn_leaves_a_text():
    """... and one that would cut a tool call leaves nothing."""
    chosen = [assistant("one two three four five six seven"), user("why?"), assistant("eight")]
    most = length("qwen", chosen[0]["content"]) - 4
    done = tokenize_pair(PreferencePair(PROMPT, chosen, REJECTED, TOOLS), [model("qwen"), model("llama")], most)
    kept = done.pair.chosen
    assert isinstance(kept, str) and chosen[0]["content"].startswith(kept) and done.cuts[0] == Cut(1, len(kept))
    text = PreferencePair(PROMPT, chosen[0]["content"], REJECTED, TOOLS)
    assert done.tokens == tokenize_pair(text, [model("qwen"), model("llama")], most).tokens
    with pytest.raises(BadRow, match="prompt_too_long"):
        read("llama", PAIR, length("llama", CHOSEN[:1]) - 1)
    read("llama", PAIR, length("llama", CHOSEN[:1]))


def test_reasoning_before_a_text_is_kept_whole_or_not_at_all():
    chosen = [assistant("one two three four", reasoning_content="how slow")]
    most = length("qwen", chosen)
    text, tokens = read("qwen", PreferencePair(PROMPT, chosen, "no"), most)
    assert parts(text, tokens) == ["how slow\n</think>\n\none two three four<|im_end|>"]
    done = tokenize_pair(PreferencePair(PROMPT, chosen, REJECTED, TOOLS), [model("qwen")], most - 3)
    assert done.pair.chosen[0]["reasoning_content"] == "how slow"
    assert "one two three four".startswith(done.pair.chosen[0]["content"])
    assert 0 < done.cuts[0].characters < len("one two three four")


# ---- keys and sets -------------------------------------------------------------------------------------------------------


def test_row_keys_follow_every_message_and_where_it_was_cut():
    pairs = [
        PAIR,
        PreferencePair(PROMPT, CHOSEN[:3], REJECTED, TOOLS),
        PreferencePair(PROMPT, [call("red"), result("slow"), *CHOSEN[2:]], REJECTED, TOOLS),
        PreferencePair(PROMPT, [*CHOSEN[:-1], assistant("red")], REJECTED, TOOLS),
        PreferencePair(PROMPT, CHOSEN, [assistant("no"), user("no"), assistant("no")], TOOLS),
    ]
    cuts = [Cut(3, None), Cut(3, 4), Cut(5, None)]
    keys = [row_key(pair) for pair in pairs] + [row_key(pairs[1], (cut, None), PAIR) for cut in cuts[:2]]
    assert len(set(keys)) == len(keys)
    # The order of a call's arguments is what templates write.
    two = [
        PreferencePair(PROMPT, [call("x", tool_calls=[{"name": "f", "arguments": a}])], "no")
        for a in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ]
    assert row_key(two[0]) != row_key(two[1])


def test_a_set_keeps_what_is_scored(tmp_path):
    """Counts, cuts and texts come back from the table; so do responses of mixes, which go through the pair table."""
    texts = [model("qwen"), model("llama")]
    examples = [*rows(6), {"prompt": PROMPT, "chosen": LONG, "rejected": [assistant("no")], "tools": TOOLS}]
    most = length("qwen", LONG[:3])
    found = prepare(examples, texts, max_length=most)
    assert not found.counts and found.truncated == 3
    for i, example in enumerate(examples):
        expected = tokenize_pair(LAYOUTS["conversational"].to_pair(example), texts, most)
        assert (found.tokens(i), found.pair(i), found.cut(i)) == (expected.tokens, expected.pair, expected.cut)
        for j, tokens in enumerate(expected.tokens):
            assert found.scored[i, j].tolist() == list(tokens.scored_lengths)
            assert found.lengths[i, j].tolist() == [
                len(x) for x in (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)
            ]
    assert (found.scored <= found.lengths[..., 1:]).all() and (found.scored < found.lengths[..., 1:]).any()
    assert (found.select([6, 0]).scored == found.scored[[6, 0]]).all()
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    mixed, _ = load_rows(parse_datasets([str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]))
    mix = prepare_pairs(mixed, find_layout(mixed), texts, max_length=most)
    assert sorted(mix.row_keys.tolist()) == sorted([*found.row_keys.tolist()] * 2)


def test_messages_for_a_judges_eyes():
    """Turns that call tools have no text of their own."""
    assert as_text([*PROMPT, call("red"), result("slow")]) == (
        '[user]\nred or blue?\n\n[assistant]\n{"name": "look_up", "arguments": {"word": "red"}}\n\n[tool]\nslow'
    )
    assert said(call("red", "Let me look.")) == 'Let me look.\n{"name": "look_up", "arguments": {"word": "red"}}'
