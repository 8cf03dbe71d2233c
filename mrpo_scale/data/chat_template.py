"""A model's chat template: text that its author wrote as a program, rendered in a sandbox, with a time limit, on a fixed date."""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import read_text
from mrpo_scale.data.messages import REASONING, Message

_MOST_SECONDS = 20.0  #: of computing for one conversation, which takes a millisecond


class ChatTemplate:
    """How one model writes conversations.

    Args:
        given: Jinja text, or a file with it; None: the tokenizer's own.
        name: the model in error messages.
        date: what a template that asks for today's date gets; None: today, as it was when this object was made.

    Attributes:
        text: the Jinja text that was given; None for the tokenizer's own.
        prints_date: whether the template asks for the date. One that never names the clock cannot.
        arguments: the names that the template takes from outside.
        words: the names of a message's fields that the template speaks of; None where it writes messages as a whole.

    Raises:
        ConfigError: a file that is none or cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        given: str | None,
        *,
        name: str,
        date: datetime.date | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self.text = None if given is None else _read_template(given, name)
        self.date = date or datetime.date.today()
        whole = str(self.text if self.text is not None else tokenizer.chat_template)
        self.prints_date = "strftime_now" in whole
        self.arguments, self.words = _names(whole if self.text is not None else tokenizer.chat_template)
        self._reasoning = self._name_of_reasoning()

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool,
    ) -> str:
        """The conversation as text; rendered by transformers, in Jinja's immutable sandbox. ``arguments``: the row's
        ``chat_template_kwargs``.

        Raises:
            TemplateError: whatever the template does wrong.
            ConfigError: it computes for too long.
        """
        try:
            self._stop_the_clock(tools)
            with _limited_time(self._name):
                rendered: Any = self._tokenizer.apply_chat_template(
                    self._renamed(messages),
                    tools=tools,
                    chat_template=self.text,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                    **(arguments or {}),
                )
        except (TemplateError, ConfigError):
            raise
        except Exception as error:
            # A template is a program of its author's: it divides by zero, runs out of memory or calls itself for ever.
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return rendered

    def names_field(self, name: str) -> bool:
        """Whether the template can show a field of messages; one that never names it cannot."""
        if name == REASONING[0]:
            name = self._reasoning
        return self.words is None or name in self.words

    def _name_of_reasoning(self) -> str:
        """What the template calls an assistant's reasoning."""
        named = REASONING if self.words is None else [name for name in REASONING if name in self.words]
        return named[0] if named else REASONING[0]

    def _renamed(self, messages: Sequence[Message]) -> list[Message]:
        ours, theirs = REASONING[0], self._reasoning
        if ours == theirs:
            return list(messages)
        return [{theirs if key == ours else key: value for key, value in m.items()} for m in messages]

    def _stop_the_clock(self, tools: list[Any] | None) -> None:
        """Put this date's clock in place of transformers' own, in the compiled template that it is about to render.

        An argument of that name does not do: transformers 5.23 turns arguments that are no plain data into text.
        """
        if self.prints_date:
            text = self._tokenizer.get_chat_template(self.text, tools)
            midnight = datetime.datetime.combine(self.date, datetime.time())
            _compile_jinja_template(text).globals["strftime_now"] = midnight.strftime


def _names(template: Any) -> tuple[frozenset[str], frozenset[str] | None]:
    """What a template takes from outside, and the fields that it names: as attributes, or as text. A template that is broken names
    nothing: it is refused when it renders.

    Args:
        template: Jinja text, or several by name.
    """
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    arguments: set[str] = set()
    words: set[str] = set()
    whole = False
    for text in texts:
        try:
            tree = _compile_jinja_template(str(text)).environment.parse(str(text))
        except TemplateError:
            continue
        arguments |= meta.find_undeclared_variables(tree)
        words |= {node.attr for node in tree.find_all(nodes.Getattr)}
        words |= {str(node.value) for node in tree.find_all(nodes.Const)}
        loops = {node.target.name for node in tree.find_all(nodes.For) if isinstance(node.target, nodes.Name)}
        dumps = (node.node for node in tree.find_all(nodes.Filter) if node.name == "tojson")
        whole = whole or any(isinstance(node, nodes.Name) and node.name in loops for node in dumps)
    return frozenset(arguments), None if whole else frozenset(words)


def _read_template(template: str, name: str) -> str:
    """A template given as Jinja text or as the path of a file."""
    if "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(f"{name}: `chat_template: {template}` is neither Jinja text nor a file; correct the path.")
    try:
        return read_text(path)
    except ValueError as error:
        raise ConfigError(f"{name}: `chat_template: {template}` {error}; correct the file.") from error


@contextmanager
def _limited_time(name: str) -> Iterator[None]:
    """End a template that loops without end; nested loops are within the sandbox's rules. It counts the time that this process
    computes, so that a machine that sleeps or is busy does not matter. Only the main thread can be interrupted.

    Raises:
        ConfigError: the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise ConfigError(
            f"{name}: its chat template has computed for {_MOST_SECONDS:g} s on one conversation; give a `chat_template`."
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
