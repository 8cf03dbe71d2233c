"""What rows say that a model does not see, or reads as something else: found row by row, counted for each model, said in one form.

A :class:`Remark` is one such thing with its counts. The log, `mrpo check` and the model card show the same sentences.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mrpo_scale.data.model_text import ModelText, Reading
from mrpo_scale.data.pairs import PreferencePair, is_prefilled

logger = logging.getLogger(__name__)

#: {reason: what is said after the number of pairs and before the models}; `{what}` is the part of a word after its colon.
_SENTENCES = {
    "merged": "merged turns of prompts, for",
    "prefilled": "the responses continue the assistant turn that ends the prompt, for",
    "trimmed": "the chat template trims white space off responses, of",
    "no_tools": "the chat template leaves tools, tool calls or tool results out of prompts, of",
    "changed": "the chat template drops or rewrites text of responses (reasoning, for instance): another text is scored, of",
    "argument": "`chat_template_kwargs` give `{what}`, which the chat template does not know, of",
    "field": "messages have `{what}`, which the chat template never names, so that it is not read, of",
    "control": "texts spell out `{what}`, which becomes the control token, for",
    "repeated_prompt": "both responses begin with their prompt (`repeated_prompt`)",
    "stripped_prompt": "both responses began with their prompt, which was taken off (`repeated_prompt: strip`)",
    "duplicate": "the same pair as an earlier one of this set",
    "known_prompt": "the prompt, with other responses, is in the {what} set too",
    "known_pair": "the whole pair is in the {what} set too",
    "unread": "no key or layout reads the columns {what}",
}
#: Tool calls are looked for in the rendering: templates get at them in many ways.
_READ_AT_LARGE = ("role", "content", "tool_calls")
_ORDINARY = ("merged", "prefilled", "trimmed", "unread", "stripped_prompt")  #: no cause to warn


@dataclass(frozen=True)
class Remark:
    """One thing to be said of a set of pairs.

    Attributes:
        word: ``reason`` or ``reason:what``; stable, in `check.json`.
        pairs: how many it holds for; of any model, the most.
        models: {model: pairs}; empty where it does not depend on one.
    """

    word: str
    pairs: int
    models: Mapping[str, int]

    @property
    def place(self) -> int:
        """In the order in which remarks are made."""
        return list(_SENTENCES).index(self.word.partition(":")[0])

    @property
    def is_warning(self) -> bool:
        return self.word.partition(":")[0] not in _ORDINARY

    @property
    def sentence(self) -> str:
        """For people: ``24 pairs: texts spell out `</s>`, which becomes the control token, for policy, anchor``."""
        reason, _, what = self.word.partition(":")
        said = _SENTENCES[reason].format(what=what)
        if self.models:
            alike = len(set(self.models.values())) == 1
            said += " " + ", ".join(name if alike else f"{name} ({n})" for name, n in self.models.items())
        return f"{self.pairs} pair{'' if self.pairs == 1 else 's'}: {said}" if self.pairs else said


def log_remarks(split: str, remarks: Sequence[Remark]) -> None:
    """A line for each."""
    for remark in remarks:
        logger.log(logging.WARNING if remark.is_warning else logging.INFO, "%s: %s", split, remark.sentence)


def row_remarks(pair: PreferencePair, text: ModelText, reading: Reading) -> list[str]:
    """The words of what one model does not see of a pair, or reads as something else than its text."""
    return list(dict.fromkeys(_row_remarks(pair, text, reading)))


def _row_remarks(pair: PreferencePair, text: ModelText, reading: Reading) -> Iterator[str]:
    for name in pair.chat_template_kwargs or ():
        if reading.raw or not text.takes_argument(name):
            yield f"argument:{name}"
    if is_prefilled(pair.prompt):
        yield "prefilled"
    turns = [
        message for part in (pair.prompt, pair.chosen, pair.rejected) if isinstance(part, list) for message in part
    ]
    for message in turns:
        for name in message:
            if name not in _READ_AT_LARGE and not text.names_field(name):
                yield f"field:{name}"
    for part in (pair.prompt, pair.chosen, pair.rejected):
        for token in text.control_tokens(part):
            yield f"control:{token}"
