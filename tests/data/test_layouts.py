"""Every layout from its fixture, rows as the real data sets have them, to the pairs that a person would write down."""

import json
import re
from pathlib import Path

import datasets
import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data import LAYOUTS, BadRow, PairOptions, PreferencePair, as_pairs, find_layout, load_rows
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.ranking import Answer, Comparison, choose_pairs
from tests.data.test_tokenization import CHATML, chatml, gemma, view

FIXTURES = Path(__file__).parents[1] / "fixtures"


def system(text):
    return {"role": "system", "content": text}


def chat(*turns):
    """Messages that alternate user and assistant; one that is a message already stays."""
    roles = iter(("user", "assistant") * len(turns))
    return [turn if isinstance(turn, dict) else {"role": next(roles), "content": turn} for turn in turns]


def pair(prompt, chosen, rejected, tools=None):
    return PreferencePair(prompt if isinstance(prompt, list) else chat(prompt), chosen, rejected, tools)


RAIN = "Write a haiku about rain."
HAIKU = "Soft rain on tin roofs\nhums the old street into sleep\nand wakes the small frogs"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKED_WEATHER = [
    system("Use the tools."),
    {"role": "user", "content": "Rain in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "name": "get_weather", "content": '{"rain": true}'},
]
# Fixture: the layout it is recognised as and, in order, its pairs; a string is the reason why there is none.
EXPECTED = {
    "strings": (
        "strings",
        [
            PreferencePair("The sky is", " blue on a clear day.", " a kind of cheese."),
            PreferencePair("Q: How many legs does a spider have?\nA:", " Eight.", " Six, like every insect."),
        ],
    ),
    "conversational_explicit": (
        "conversational",
        [
            pair("What color is the sky?", "It is blue.", "It is green."),
            pair(chat("Name a prime.", "Seven.", "An even one?"), "Two.", "Four."),
        ],
    ),
    "conversational_implicit": (
        "conversational",
        [
            pair("Hi!", "Hello, how can I help?", "What."),
            pair(chat(system("Answer in French."), "Good morning"), "Bonjour", "Good morning"),
        ],
    ),
    # Equal scores are no contradiction: the set itself says which one is chosen.
    "ultrafeedback_binarized": (
        "conversational",
        [
            pair("Give me a synonym of quick.", "Fast.", "Slow."),
            pair("Who wrote Faust?", "Goethe wrote it.", "Johann Wolfgang von Goethe."),
            "contradictory_scores",
        ],
    ),
    "sharegpt": (
        "sharegpt",
        [
            pair("Suggest a name for a cat.", "Miso.", "Cat."),
            pair(
                chat(system("You are a chef."), "How long do eggs boil?", "Soft or hard?", "Hard."),
                "Ten minutes.",
                "An hour.",
            ),
        ],
    ),
    "hh_strings": (
        "hh_strings",
        [
            pair(
                "How do I get a stain out of wool?",
                "Use cold water and a mild soap.",
                "Use cold water and then the dryer.",
            ),
            pair(
                chat("Hi", "Hello! What do you need?", "A joke, in two lines:\n\nplease."),
                "I told my plants a joke.\nThey grew on me.",
                "No.",
            ),
        ],
    ),
    # Four answers with helpfulness 1, 4, 0, 1: five pairs and a tie. One answer alone. Two that tie.
    "helpsteer": (
        "helpsteer",
        [
            pair(RAIN, HAIKU, "Rain on the tin roof"),
            pair(RAIN, HAIKU, "Rain rain rain rain rain"),
            pair(RAIN, HAIKU, "I cannot write poems."),
            pair(RAIN, "Rain on the tin roof", "I cannot write poems."),
            pair(RAIN, "Rain rain rain rain rain", "I cannot write poems."),
            "tied_scores",
            "single_answer",
            "tied_scores",
        ],
    ),
    "helpsteer2": (
        "helpsteer",
        [
            pair("Name a mammal that lays eggs.", "The platypus.", "The whale."),
            pair(
                chat("c#", "C# is a language by Microsoft.", "Since when?"),
                "Since 2000; version 1.0 came with .NET in 2002.",
                "I am not sure.",
            ),
        ],
    ),
    "nectar": (
        "nectar",
        [
            pair("Capital of Peru?", "Lima.", "It is Lima, I think."),
            pair("Capital of Peru?", "Lima.", "Cusco."),
            pair("Capital of Peru?", "It is Lima, I think.", "Cusco."),
            pair(chat("Pick a number", "Seven", "Another"), "Nine", "Seven again"),
            pair(chat("Pick a number", "Seven", "Another"), "Nine", "no"),
            "tied_ranks",
            "rank_missing",
            pair("Say hi", "Hi!", "hey you"),
        ],
    ),
    "orca": (
        "orca",
        [
            pair(
                chat(system("You are a helpful assistant."), "Is 7 a prime number?"),
                "Yes, only 1 and 7 divide it.",
                "No.",
            ),
            pair("Which season follows winter?", "Spring.", "Autumn."),
        ],
    ),
    "orca_argilla": (
        "orca",
        [
            pair(
                chat(system("Think step by step."), "2 apples and 3 pears: how many fruits?"), "2 + 3 = 5 fruits.", "6"
            ),
            "tied_scores",
        ],
    ),
    "orca_math": (
        "orca",
        [pair("What is the sum of the first 4 odd numbers?", "1 + 3 + 5 + 7 = 16.", "15"), "contradictory_scores"],
    ),
    "gpt4_llm": (
        "gpt4_llm",
        [
            pair("Give one tip for staying healthy.", "Sleep eight hours.", "Be healthy"),
            pair("Give one tip for staying healthy.", "Walk every day.", "Be healthy"),
            "tied_scores",
            pair("Classify the animal.\nFrog", "An amphibian.", "A fish."),
        ],
    ),
    "gpt4_llm_ordered": (
        "gpt4_llm",
        [
            pair("Name the opposite of hot.", "Cold.", "Warm."),
            pair("Translate to Spanish.\nThank you", "Gracias", "Thank you"),
        ],
    ),
    "gpt4_llm_completions": ("gpt4_llm", [pair("Rewrite in capitals: abc", "ABC", "abc")]),
    "swift": (
        "swift",
        [
            pair(chat(system("Be brief."), "2+2?"), "4", "5"),
            pair(chat("Hi", "Hello", "2+2?"), "4", "Five"),
            "malformed",  # no answer
        ],
    ),
    "swift_messages": ("swift", [pair("2+2?", "4", "5"), "malformed"]),
    "openai": (
        "openai",
        [pair(chat(system("Be brief."), "2+2?"), "4", "5", [{"type": "function", "function": {"name": "add"}}])],
    ),
    "nemo_rl": ("nemo_rl", [pair("2+2?", "4", "5"), "tied_ranks"]),
    "axolotl": ("conversational", [pair(chat(system("Be brief."), "2+2?"), "4", "5"), pair("2+2?", "4", "5")]),
    "text_parts": ("conversational", [pair("2+2?", "4", "5"), "not_text"]),
    "tools": ("conversational", [pair(ASKED_WEATHER, "Yes, it rains in Oslo.", "I do not know.", [WEATHER])]),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(name):
    return load_rows(str(FIXTURES / f"{name}.jsonl"))[0]


def read(rows, layout, **options):
    """Every pair of a set, or the reason why there is none."""
    rows, layout = as_pairs(rows, layout, PairOptions(**options))
    pairs = []
    for row in rows:
        try:
            pairs.append(layout.to_pair(row))
        except BadRow as bad:
            pairs.append(bad.reason)
    return pairs


@pytest.mark.parametrize("fixture", EXPECTED)
def test_fixture_gives_the_pairs_written_by_hand(fixture):
    name, expected = EXPECTED[fixture]
    rows = load(fixture)
    layout = find_layout(rows)
    assert layout.name == name
    assert read(rows, layout) == expected
    assert find_layout(rows, name) is layout
    assert [other.name for other in LAYOUTS.values() if other.matches(set(rows.column_names), rows[0])] == [name]


def test_every_layout_has_a_fixture_and_every_fixture_a_test():
    assert {name for name, _ in EXPECTED.values()} == set(LAYOUTS)
    assert {path.stem for path in FIXTURES.glob("*.jsonl")} == set(EXPECTED)


# ---- ranked and scored answers ---------------------------------------------------------------------------------------


def test_best_against_a_random_one_is_seeded_for_each_prompt():
    rows = datasets.concatenate_datasets([load("nectar").select([0])] * 40)
    nectar = LAYOUTS["nectar"]
    first, again, other = (read(rows, nectar, ranked_pairs="best_vs_random", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert {p.chosen for p in first} == {"Lima."}, "the best one, once for each prompt"
    assert {p.rejected for p in first} == {"It is Lima, I think.", "Cusco."}, "40 draws of two answers"
    some = read(rows.select([39, 5, 20]), nectar, ranked_pairs="best_vs_random", seed=1)
    assert some == [first[39], first[5], first[20]], "a prompt's draw does not depend on the other prompts"


def test_best_against_the_worst():
    read_nectar = read(load("nectar"), LAYOUTS["nectar"], ranked_pairs="best_vs_worst")
    assert read_nectar == [
        pair("Capital of Peru?", "Lima.", "Cusco."),
        pair(chat("Pick a number", "Seven", "Another"), "Nine", "no"),
        "tied_ranks",  # a contradiction is counted whichever pairs are asked for
        "rank_missing",
        pair("Say hi", "Hi!", "hey you"),
    ]
    scored = read(load("helpsteer"), LAYOUTS["helpsteer"], ranked_pairs="best_vs_worst")
    assert scored == [pair(RAIN, HAIKU, "I cannot write poems."), "single_answer", "tied_scores"]


def test_score_columns_are_summed():
    """By helpfulness + correctness the two that tied (3 + 4 and 3 + 3) do not."""
    columns = ("helpfulness", "correctness")
    pairs = read(load("helpsteer"), LAYOUTS["helpsteer"], score_columns=columns)
    assert pairs[-1] == pair(
        "What is a simile?",
        "A comparison with like or as.",
        "A figure of speech that compares with like or as.",
    )
    with pytest.raises(ConfigError, match=r"`score_columns: overall`: the data set has no column `overall`; it has co"):
        read(load("helpsteer"), LAYOUTS["helpsteer"], score_columns=("overall",))


def test_answers_of_a_prompt_belong_together_wherever_they_are():
    rows = load("helpsteer2").select([2, 0, 3, 1])
    assert sorted(p.chosen for p in read(rows, LAYOUTS["helpsteer"])) == sorted(
        p.chosen for p in EXPECTED["helpsteer2"][1]
    )


def test_scores_as_text_and_missing_scores():
    """GPT-4's scores come as text in some copies."""
    answers = [{"response": text, "score": score} for text, score in (("a", "9"), ("b", "7.5"), ("c", "n/a"))]
    rows = datasets.Dataset.from_list([{"user_input": "q", "responses_and_scores": answers}])
    assert read(rows, find_layout(rows)) == ["score_missing", pair("q", "a", "b")]


def test_ranks_need_not_be_consecutive():
    """A copy of Nectar without one model's answers has gaps; the order is as clear as before."""
    ranked = Comparison(chat("q"), [Answer("c", -7.0), Answer("a", -2.0), Answer("b", -4.0)], by="rank")
    chosen = [(better.text, worse.text) for (better, worse), bad in choose_pairs(ranked, "all", None) if bad is None]
    assert chosen == [("a", "b"), ("a", "c"), ("b", "c")]


BAD_RANKED = [
    ("helpsteer", {"prompt": None, "response": "a", "helpfulness": 1}, "`prompt` is missing"),
    ("helpsteer", {"prompt": "q\n<extra_id_1>Assistant\na", "response": "a", "helpfulness": 1}, "ends with an assista"),
    ("nectar", {"prompt": "q", "answers": []}, "`answers` is not a list of {answer, rank}"),
    ("nectar", {"prompt": "\n\nHuman: q\n\nAssistant: a", "answers": []}, "does not end with a user turn"),
    ("gpt4_llm", {"instruction": "q", "output": ["only one"]}, "no list of answers"),
    ("gpt4_llm", {"user_input": 3, "output": ["a", "b"]}, "`instruction` is a int"),
]


@pytest.mark.parametrize(("name", "row", "detail"), BAD_RANKED)
def test_malformed_ranked_rows(name, row, detail):
    with pytest.raises(BadRow, match="malformed") as bad:
        LAYOUTS[name].read([row], PairOptions())
    assert detail in bad.value.detail


def test_an_answer_that_is_no_text_spoils_its_pairs_only():
    answers = [{"answer": text, "rank": float(rank)} for rank, text in enumerate(("a", None, "c"))]
    rows = datasets.Dataset.from_list([{"prompt": "q", "answers": answers}])
    assert read(rows, LAYOUTS["nectar"]) == ["malformed", pair("q", "a", "c"), "malformed"]


# ---- system turns, tools, contradictions -----------------------------------------------------------------------------


def test_system_turns_and_tools_reach_every_models_prompt():
    """One row through a template that knows tools and system turns, and the system turn merged where a template has none."""
    template = "{% if tools %}TOOLS {{ tools[0].function.name }}\n{% endif %}" + CHATML
    with_tools = view(template=template)
    (row,) = read(load("tools"), LAYOUTS["conversational"])
    text = with_tools.render_prompt(row)
    assert text.startswith("TOOLS get_weather\n<|im_start|>system\nUse the tools.<|im_end|>")
    assert '<|im_start|>tool\n{"rain": true}<|im_end|>' in text
    asked = read(load("orca"), LAYOUTS["orca"])[0]
    assert chatml().render_prompt(asked).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    merged = gemma(system="merge").render_prompt(asked)
    assert "user\nYou are a helpful assistant.\n\nIs 7 a prime number?" in merged


def test_a_system_column_beside_strings_makes_a_conversation():
    """As raw strings, the system turn would be lost without a word."""
    row = {"system": "Be brief.", "prompt": "2+2?", "chosen": "4", "rejected": "5"}
    rows = datasets.Dataset.from_list([row])
    assert read(rows, find_layout(rows)) == [pair(chat(system("Be brief."), "2+2?"), "4", "5")]
    messages = {**row, "chosen": chat("2+2?", "4"), "rejected": chat("2+2?", "5"), "prompt": chat("2+2?")}
    messages |= {"chosen": messages["chosen"][1:], "rejected": messages["rejected"][1:]}
    rows = datasets.Dataset.from_list([messages])
    assert read(rows, find_layout(rows)) == [pair(chat(system("Be brief."), "2+2?"), "4", "5")]


@pytest.mark.parametrize(("name", "reason"), [("nectar", "rank_missing"), ("orca_math", "contradictory_scores")])
def test_contradictions_are_counted_listed_and_stop_a_strict_run(name, reason, tmp_path):
    """Nectar's third row has an answer without a rank, its second one two answers of one rank; the math set's second row has
    the rejected answer rated higher."""
    rows = load(name)
    prepared = prepare_pairs(rows, find_layout(rows), [chatml()], max_length=None, max_bad_rows=0.5)
    expected = [entry for entry in EXPECTED[name][1] if isinstance(entry, str)]
    assert prepared.counts == dict.fromkeys(expected, 1)
    assert [prepared.pair(i) for i in range(len(prepared))] == [
        entry for entry in EXPECTED[name][1] if not isinstance(entry, str)
    ]
    listed = {entry["reason"]: entry["row"] for entry in prepared.bad_rows()}
    assert listed == ({"tied_ranks": 1, "rank_missing": 2} if name == "nectar" else {"contradictory_scores": 1})
    with pytest.raises(
        ConfigError, match=r"`on_bad_row: error`: row 1 of the train set is bad: (tied_ranks|contradict)"
    ):
        prepare_pairs(rows, find_layout(rows), [chatml()], max_length=None, on_bad_row="error")


def test_ties_are_counted_but_are_no_bad_rows():
    """Half of HelpSteer's fixture ties or has one answer: a strict run takes it nevertheless."""
    rows = load("helpsteer")
    prepared = prepare_pairs(
        rows, LAYOUTS["helpsteer"], [chatml()], max_length=None, on_bad_row="error", max_bad_rows=0
    )
    assert prepared.counts == {"tied_scores": 2, "single_answer": 1}
    assert len(prepared) == 5
    assert list(prepared.bad_rows())[-1] == {
        "row": 5,
        "other_row": 6,
        "reason": "tied_scores",
        "detail": "two answers have score 3",
    }
    assert [prepared.source(i) for i in (0, 2)] == ["rows 1 and 0", "rows 1 and 2"]


def test_a_set_of_ties_gives_no_pair():
    rows = load("helpsteer").select([0, 3])
    with pytest.raises(
        ConfigError, match="the train set gives no pair: 1 tied_scores; choose other data or `score_col"
    ):
        prepare_pairs(rows, LAYOUTS["helpsteer"], [chatml()], max_length=None)


# ---- the documentation -----------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_documented_row_gives_the_documented_pair(name):
    section = DOCUMENT.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    rows, pairs = (
        [json.loads(line) for line in block.splitlines()]
        for block in re.findall(r"```json\n(.*?)\n```", section, flags=re.DOTALL)
    )
    dataset = datasets.Dataset.from_list(rows)
    layout = find_layout(dataset)
    assert layout.name == name
    assert read(dataset, layout) == [PreferencePair(**p) for p in pairs]
