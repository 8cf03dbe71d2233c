"""What the keys say about data, before any is read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import parse_json

#: Columns that are read, or {name here: name in the set}.
Columns = tuple[str, ...] | Mapping[str, str] | None


@dataclass(frozen=True)
class DatasetSpec:
    """One data set as a recipe names it: its name, or a mapping of these keys.

    Args:
        weight: the set's share of the pairs, relative to the other sets'.
        subset: how much of the set's own training rows to take, at random: a fraction below 1, or a number of rows.
        columns: the columns that are read, all others are left out; or {name here: name in the set} of columns to rename, and all
            others stay.
    """

    name: str
    config: str | None = None
    split: str | None = None
    weight: float | None = None
    layout: str | None = None
    subset: float | None = None
    columns: Columns = None

    @property
    def label(self) -> str:
        """What its rows are called in messages."""
        parts = [part for part in (self.config, self.split) if part]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


#: One data set as typed.
Entry = str | Mapping[str, Any] | DatasetSpec


def parse_datasets(dataset_name: Entry | Sequence[Entry]) -> list[DatasetSpec]:
    """``dataset_name`` as typed: a name, a mapping, a list of them, or mappings as JSON text (how the command line carries them).

    Raises:
        ConfigError: an unknown key, no name, a weight that is not above 0, or weights for some of the sets only.
    """
    entries = [dataset_name] if isinstance(dataset_name, (str, Mapping, DatasetSpec)) else list(dataset_name)
    specs = [_parse(entry) for entry in entries]
    without = [spec.name for spec in specs if spec.weight is None]
    if len(specs) > 1 and 0 < len(without) < len(specs):
        raise ConfigError(
            f"`dataset_name`: `{without[0]}` has no `weight` but others have; give all of them one, or none."
        )
    return specs


def _parse(entry: Entry) -> DatasetSpec:
    if isinstance(entry, DatasetSpec):
        return entry
    values: Any = entry
    if isinstance(entry, str):
        try:
            values = parse_json(entry) if entry.lstrip().startswith("{") else {"name": entry}
        except ValueError as error:
            raise ConfigError(f"`dataset_name: {entry}` is not a name nor a JSON mapping: {error}.") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"`dataset_name: {entry}` must be a name or a mapping, got {type(entry).__name__}.")
    known = [field.name for field in fields(DatasetSpec)]
    unknown = sorted(set(values) - set(known))
    if unknown or not values.get("name"):
        problem = f"unknown key `{unknown[0]}`" if unknown else "key `name` is missing"
        raise ConfigError(f"`dataset_name: {dict(values)}`: {problem}; known keys are {', '.join(known)}.")
    for key, value in values.items():
        if value is not None and not _fits(key, value):
            what = {"columns": _COLUMNS, **dict.fromkeys(_NUMBERS, "a number above 0")}.get(key, "text")
            shown = value if key in _NUMBERS else repr(value)
            raise ConfigError(f"`dataset_name: {dict(values)}`: `{key}: {shown}` must be {what}.")
    return DatasetSpec(**{**values, "columns": _columns(values.get("columns"))})


_NUMBERS = ("weight", "subset")
_COLUMNS = "a list of names, or a mapping of names here to names in the set, such as {prompt: question}"


def _columns(value: Any) -> Columns:
    return (dict(value) if isinstance(value, Mapping) else tuple(value)) if value else None


def parse_columns(value: Any) -> Columns:
    """The key ``columns``: as in a :class:`DatasetSpec`, or JSON text of it (how the command line carries it).

    Raises:
        ConfigError: it is neither a list of names nor a mapping of names.
    """
    given = value
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            value = None
        if not value:
            raise ConfigError(f"`columns: {given}` must be {_COLUMNS}.")
    if value is not None and not _fits("columns", value):
        raise ConfigError(f"`columns: {given}` must be {_COLUMNS}.")
    return _columns(value)


#: Arguments of `apply_chat_template` that say how it is called. `documents` is the data's.
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}
RESERVED |= {"messages", "strftime_now", "raise_exception"}


def parse_template_kwargs(value: Any) -> dict[str, Any]:
    """The key ``chat_template_kwargs``: a mapping, or JSON text of one (how the command line carries it).

    Raises:
        ConfigError: it is no mapping, or holds what is decided elsewhere.
    """
    given = value
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ConfigError(f"`chat_template_kwargs: {given}` is not JSON: {error}.") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"`chat_template_kwargs: {given}` must be a mapping, such as {{enable_thinking: false}}.")
    taken = sorted(RESERVED & set(value))
    if taken:
        raise ConfigError(f"`chat_template_kwargs`: `{taken[0]}` is decided for every model already; remove it.")
    try:
        json.dumps(value)
    except TypeError as error:
        raise ConfigError(f"`chat_template_kwargs: {given}`: {error}; use text, numbers, lists and mappings.") from None
    return dict(value)


def _fits(key: str, value: Any) -> bool:
    if key in _NUMBERS:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    if key == "columns":
        names = [*value, *value.values()] if isinstance(value, Mapping) else value
        return isinstance(value, (list, tuple, Mapping)) and all(isinstance(name, str) for name in names)
    return isinstance(value, str)


#: What to do where responses begin with their prompt.
RepeatedPrompt = Literal["error", "strip", "keep"]


@dataclass(frozen=True)
class PairOptions:
    """How rows become pairs. All of it is part of the cache keys.

    Args:
        ranked_pairs: ``all`` (every two answers of a prompt), ``best_vs_random`` or ``best_vs_worst`` (one pair per prompt).
        score_columns: the numbers whose sum ranks single answers (layout ``helpsteer``).
        seed: of the random answer. Each prompt draws from its own stream, so neither order nor processes change it.
        repeated_prompt: ``strip`` takes the prompt off responses that both begin with it.
        chat_template_kwargs: JSON of the arguments that chat templates get for every row; a row's own win.
    """

    ranked_pairs: str = "all"
    score_columns: tuple[str, ...] = ("helpfulness",)
    seed: int = 42
    repeated_prompt: RepeatedPrompt = "error"
    chat_template_kwargs: str = "{}"


RANKED_PAIRS = ("all", "best_vs_random", "best_vs_worst")


#: For models without a chat template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ raise_exception('the plain template has no ' + message['role'] + ' turns') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
