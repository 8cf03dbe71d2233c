"""The skills of the toy world: questions with an exact answer, and one systematic misconception about each.

To add one: a function here, a line in ``SKILLS`` and a reliability for every model in toy_world.py; then raise ``WORLD_VERSION``.
"""

from __future__ import annotations

import random
from collections.abc import Callable

OPPOSITES = (
    "hot cold,big small,up down,fast slow,day night,open shut,wet dry,old new,rich poor,hard soft,full empty,early late,high low,"
    "light dark,loud quiet,near far,push pull,start end,sweet sour,thick thin,true false,war peace,win lose,young aged,clean dirty,"
    "deep shallow,sharp blunt,strong weak,wide narrow,buy sell"
)
ANTONYMS = {a: b for pair in OPPOSITES.split(",") for a, b in (pair.split(), pair.split()[::-1])}

Question = tuple[str, str, str]  # prompt, right answer, what the skill's one misconception answers


def _compare(rng: random.Random) -> Question:
    a, b = rng.sample(range(10, 100), 2)
    word = rng.choice(("larger", "smaller"))
    right, wrong = (max(a, b), min(a, b)) if word == "larger" else (min(a, b), max(a, b))
    return f"Which is {word}, {a} or {b}?", f"{right} is {word} than {wrong}.", f"{wrong} is {word} than {right}."


def _parity(rng: random.Random) -> Question:
    number = rng.randint(10, 999)
    right, wrong = ("an even", "an odd") if number % 2 == 0 else ("an odd", "an even")
    return f"Is {number} even or odd?", f"{number} is {right} number.", f"{number} is {wrong} number."


def _next(rng: random.Random) -> Question:
    number = rng.randint(10, 998)
    return f"What comes after {number}?", f"{number + 1} comes after {number}.", f"{number - 1} comes after {number}."


def _order(rng: random.Random) -> Question:
    numbers = rng.sample("123456789", 4)
    up = sorted(numbers)
    return f"Sort {' '.join(numbers)}.", f"Sorted: {' '.join(up)}.", f"Sorted: {' '.join(up[::-1])}."


def _reverse(rng: random.Random) -> Question:
    letters = rng.sample("abcdefghkmnpqrstuwxyz", 4)
    text, reversed_text = " ".join(letters), " ".join(letters[::-1])
    return f"Reverse {text}.", f"Reversed: {reversed_text}.", f"Reversed: {text}."


def _opposite(rng: random.Random) -> Question:
    words = list(ANTONYMS)
    i = rng.randrange(len(words))
    word, wrong = words[i], words[i - 2]  # the same side of the neighbouring pair
    ask = rng.choice(("What is the opposite of {}?", "Give the opposite of {}.", "Opposite of {}?"))
    return ask.format(word), f"The opposite of {word} is {ANTONYMS[word]}.", f"The opposite of {word} is {wrong}."


SKILLS: dict[str, Callable[[random.Random], Question]] = {
    "compare": _compare,
    "parity": _parity,
    "next": _next,
    "order": _order,
    "reverse": _reverse,
    "opposite": _opposite,
}
