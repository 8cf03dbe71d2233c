"""Chat templates in the manner of today's models, written anew: what is trained on is what the template renders."""

import datetime
import logging

import datasets
import pytest

from mrpo_scale.data import LAYOUTS, BadRow, PreferencePair
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.tokenization import ModelText, tokenize_pair
from tests.data.test_tokenization import CHATML, chatml, say, text_of, tiny

#: Writes an empty think block where the last answer has no reasoning, and drops the reasoning of earlier ones.
QWEN3 = (
    "{% for m in messages %}{% set text = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Drops all reasoning; its generation prompt begins one.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
#: Keeps the reasoning that its generation prompt begins.
QWQ = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% set date_string = strftime_now('%d %b %Y') %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
#: No generation prompt; a blank before the answer, which becomes part of the answer's first token.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system if loop.first else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
#: The last answer is said in a channel, and ends with a token of its own.
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TEMPLATES = {
    "qwen3": QWEN3,
    "deepseek_r1": DEEPSEEK_R1,
    "qwq": QWQ,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "gpt_oss": GPT_OSS,
}
SPECIAL = [
    *(
        "<think>",
        "</think>",
        "<|User|>",
        "<|Assistant|>",
        "<|end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    *("[INST]", "[/INST]", "<|start|>", "<|message|>", "<|channel|>", "<|return|>"),
]
DAY = datetime.date(2026, 11, 26)
SYSTEM = {"role": "system", "content": "Be brief."}
PROMPTS = {"one": say("hello"), "three": say("hello", "hello there", "how are you?")}
ENDS = ("<|im_end|>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<|return|>")
THINKING = "<think>\nhow quick\n</think>\n\nthe lazy dog"


def model(template, name="policy", **options):
    tokenizer = tiny(330, template=TEMPLATES.get(template, template))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return ModelText(tokenizer, name=name, max_context=None, date=DAY, **options)


def whole_ids(model, prompt, response):
    """Tokens of the template's rendering of the whole conversation, up to the end of the last turn."""
    text = model._template.render([*prompt, {"role": "assistant", "content": response}], generation_prompt=False)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = model.tokenizer.convert_tokens_to_ids(list(ENDS))
    return ids[: max(i for i, token in enumerate(ids) if token in ends) + 1]


@pytest.mark.parametrize(
    ("template", "system"),
    [(template, system) for template in TEMPLATES for system in (False, True) if not (system and template == "gemma")],
)
@pytest.mark.parametrize("turns", PROMPTS)
@pytest.mark.parametrize(
    "responses",
    [
        ("how are you?", "the lazy dog"),
        (" how are you?\n", "the lazy dog "),
        (THINKING, "jumps"),
        (THINKING, THINKING + "!"),
    ],
    ids=["plain", "untrimmed", "one thinks", "both think"],
)
def test_tokens_are_those_of_the_templates_rendering(template, turns, system, responses):
    """Of the whole conversation, up to the end of the turn."""
    prompt = [SYSTEM, *PROMPTS[turns]] if system else PROMPTS[turns]
    text = model(template)
    (tokens,) = tokenize_pair(PreferencePair(prompt, *responses), [text], None).tokens
    assert tokens.prompt_ids + tokens.chosen_ids == whole_ids(text, prompt, responses[0])
    assert tokens.prompt_ids + tokens.rejected_ids == whole_ids(text, prompt, responses[1])
    shown = text_of(text, tokens.prompt_ids + tokens.chosen_ids)
    assert shown.count("<think>") == shown.count("</think>") <= 1


#: (prompt's end, chosen, rejected), written by hand.
BOUNDARIES = {
    "qwen3": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "how are you?<|im_end|>", "the lazy dog<|im_end|>"),
    "deepseek_r1": ("hello<|Assistant|>", "how are you?<|end|>", "the lazy dog<|end|>"),
    "llama3": ("assistant<|end_header_id|>\n\n", "how are you?<|eot_id|>", "the lazy dog<|eot_id|>"),
    "gemma": ("<start_of_turn>model\n", "how are you?<end_of_turn>", "the lazy dog<end_of_turn>"),
    "mistral": ("hello[/INST]", " how are you?</s>", " the lazy dog</s>"),
    "gpt_oss": ("<|start|>assistant<|channel|>final<|message|>", "how are you?<|return|>", "the lazy dog<|return|>"),
}


@pytest.mark.parametrize("template", BOUNDARIES)
def test_what_stands_before_both_responses_is_prompt(template):
    text = model(template)
    (tokens,) = tokenize_pair(PreferencePair(say("hello"), "how are you?", "the lazy dog"), [text], None).tokens
    prompt, *responses = (text_of(text, ids) for ids in (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids))
    end, *expected = BOUNDARIES[template]
    assert prompt.endswith(end)
    assert responses == expected


def test_what_stands_before_one_response_is_part_of_it():
    """An empty think block before the answer without reasoning: the model would have to write it, where it writes reasoning now."""
    text = model("qwen3")
    (tokens,) = tokenize_pair(PreferencePair(say("hello"), THINKING, "jumps"), [text], None).tokens
    prompt, chosen, rejected = (
        text_of(text, ids) for ids in (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)
    )
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == THINKING + "<|im_end|>"
    assert rejected == "<think>\n\n</think>\n\njumps<|im_end|>"


def test_a_response_that_begins_as_the_generation_prompt_ends_begins_once():
    text = model("qwq")
    pair = PreferencePair(say("hello"), THINKING, THINKING + "!")
    (tokens,) = tokenize_pair(pair, [text], None).tokens
    assert text_of(text, tokens.prompt_ids) == text.render_prompt(pair)
    assert text_of(text, tokens.chosen_ids) == "how quick\n</think>\n\nthe lazy dog<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_keeps_the_prompt_that_a_model_gets():
    """Mistral's: the system text stands in the last user turn, if that is the last turn of all."""
    template = MISTRAL.replace("loop.first", "loop.last")
    text = model(template)
    prompt = [SYSTEM, *say("hello")]
    (tokens,) = tokenize_pair(PreferencePair(prompt, "jumps", "dog"), [text], None).tokens
    assert text_of(text, tokens.prompt_ids) == "<s>[INST] Be brief.\n\nhello[/INST]"
    assert text_of(text, tokens.chosen_ids) == " jumps</s>"


# ---- what a template drops ---------------------------------------------------------------------------------------------


def prepare(pairs, texts, **options):
    rows = datasets.Dataset.from_list(
        [{"prompt": p.prompt, **{k: say("", getattr(p, k))[1:] for k in ("chosen", "rejected")}} for p in pairs]
    )
    return prepare_pairs(rows, LAYOUTS["conversational"], texts, **{"max_length": None, "max_bad_rows": 1.0, **options})


def test_what_a_template_drops_is_counted_and_said(caplog):
    pairs = [
        PreferencePair(say("hello"), THINKING, "jumps"),
        PreferencePair(say("hello"), "fox\n", "jumps"),
        PreferencePair(say("hello"), "fox", "jumps"),
    ]
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        found = prepare(pairs, [model("qwen3"), model("deepseek_r1", "r1"), model("llama3", "llama")])
    assert (found.changed, found.trimmed) == ({"r1": 1}, {"llama": 1})
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith("mrpo_scale")]
    assert said[0] == ("INFO", "train: 1 pair: the chat template trims white space off responses, of llama")
    assert said[1][0] == "WARNING" and said[1][1].endswith(": another text is scored, of r1")
    assert said[1][1].startswith("train: 1 pair: the chat template drops or rewrites text of responses")


def test_responses_that_one_template_cannot_tell_apart_are_identical():
    """ "x" and "x\\n" are one text for a template that trims; reasoning alone is none for one that drops it."""
    for chosen, rejected, name in (("x", "x\n", "llama3"), (THINKING, "\n\nthe lazy dog", "deepseek_r1")):
        pair = PreferencePair(say("hello"), chosen, rejected)
        tokenize_pair(pair, [chatml()], None)
        with pytest.raises(BadRow, match=f"identical_responses: {name} reads chosen and rejected as the same text"):
            tokenize_pair(pair, [chatml(), model(name, name)], None)
    with pytest.raises(BadRow, match="empty_response: a response has no tokens for r1"):
        tokenize_pair(PreferencePair(say("hello"), "<think>\nfox\n</think>", "dog"), [model("deepseek_r1", "r1")], None)


# ---- cuts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("keep", [1, 3, 6, 9])
def test_a_cut_is_the_start_of_the_rendering(template, keep):
    """Cut in the policy's tokens, with the same text for a model of another template; what precedes it stays as of the whole."""
    text, other = model(template), chatml("other")
    long = "the quick brown fox jumps over the lazy dog " * 2
    pair = PreferencePair(say("hello"), f" {long}", "dog")
    (whole,) = tokenize_pair(pair, [text], None).tokens
    done = tokenize_pair(pair, [text, other], len(whole.prompt_ids) + max(keep, len(whole.rejected_ids)))
    assert done.cut == (True, False)
    ours, theirs = done.tokens
    assert ours.prompt_ids == whole.prompt_ids
    assert ours.chosen_ids == whole.chosen_ids[: len(ours.chosen_ids)]
    scored = text_of(text, ours.chosen_ids)
    assert scored.strip() == text_of(other, theirs.chosen_ids).strip() == done.pair.chosen.strip()


def test_a_cut_within_reasoning():
    """The template still knows that the reasoning ends: it writes no empty block before its beginning."""
    text = model("qwen3")
    pair = PreferencePair(say("hello"), THINKING, "jumps")
    (whole,) = tokenize_pair(pair, [text], None).tokens
    done = tokenize_pair(pair, [text, chatml("other")], len(whole.prompt_ids) + len(whole.rejected_ids))
    assert done.cut == (True, False)
    assert text_of(text, done.tokens[0].chosen_ids).startswith("<think>\nhow quick\n</think>")
    assert done.pair.chosen.startswith("<think>\nhow quick\n</think>") and THINKING.startswith(done.pair.chosen)
    # A model that drops the reasoning has nothing left of it.
    with pytest.raises(BadRow, match="empty_response: a response has no tokens for r1"):
        other = PreferencePair(say("hello"), THINKING, THINKING.replace("how", "you"))
        tokenize_pair(other, [text, model("deepseek_r1", "r1")], len(whole.prompt_ids) + 6)


def test_rows_cut_to_the_same_text_have_keys_of_their_own():
    """What was cut off may decide what a template writes before the response."""
    pairs = [
        PreferencePair(say("hello"), "<think>\n" + "the lazy dog " * 9 + end, "jumps")
        for end in ("</think>\n\nfox", "fox")
    ]
    found = prepare(pairs, [chatml()], max_length=60)
    assert found.pair(0) == found.pair(1) and found.cut(0) == found.cut(1) == (True, False)
    assert found.row_keys[0] != found.row_keys[1]


# ---- system turns without text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_system_turn_without_text_vanishes(text):
    empty = {"role": "system", "content": text}
    answers = {"chosen": say("", "fox")[1:], "rejected": say("", "dog")[1:]}
    turn = {"from": "human", "value": "hello"}
    rows = {
        "conversational": [
            {"prompt": [empty, *say("hello")], **answers},
            {"prompt": say("hello"), "system": text, **answers},
            {k: [empty, *say("hello"), *v] for k, v in answers.items()},
        ],
        "orca": [{"question": "hello", "system": text, "chosen": "fox", "rejected": "dog"}],
        "sharegpt": [
            {
                "conversations": [{"from": "system", "value": text}, turn],
                **{k: {"from": "gpt", "value": v[0]["content"]} for k, v in answers.items()},
            }
        ],
    }
    for layout, examples in rows.items():
        for row in examples:
            assert LAYOUTS[layout].to_pair(row) == PreferencePair(say("hello"), "fox", "dog"), layout
