"""How a key is declared: its default, its help text and, in the annotation, its marks: ``beta: Decides[float] = key(0.1, "...")``.

Marks are no ``field.metadata``: HfArgumentParser hands all metadata to argparse, which refuses words that it does not know, so a
script that parses MRPOConfig with a parser of its own would end there.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Annotated, Any, Final, TypeVar, get_origin, get_type_hints

T = TypeVar("T")


def key(default: Any, text: str) -> Any:
    """A dataclass field with the help text that ``--help`` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


class Role(StrEnum):
    """Every key of MRPOConfig's own has exactly one."""

    DECIDES = "decides"  #: the result depends on it: a checkpoint is continued under the same value only
    HASHED = "hashed"  #: the result depends on it through the hash of a model or of the rows, which is what is compared
    PLACE = "place"  #: where files lie, how long a job has, how many processes read: no part of the recipe in a report
    OTHER = "other"  #: what is shown, and how the same numbers are computed


#: Mark of a key of which all runs of ``mrpo compare`` have one value; otherwise their pairs or scores would differ.
COMMON: Final = "common to the runs of a comparison"


@dataclass(frozen=True)
class UsedBy:
    """The objectives that read the key; of a key without this mark, all do."""

    objectives: tuple[str, ...]


@dataclass(frozen=True)
class AtLeast:
    """The least value of a number; None is allowed where the key may be empty."""

    least: float


@dataclass(frozen=True)
class OneOf:
    """The words that a key takes, where its type does not list them."""

    words: tuple[str, ...]


Decides = Annotated[T, Role.DECIDES]
Hashed = Annotated[T, Role.HASHED, COMMON]
Place = Annotated[T, Role.PLACE]
Other = Annotated[T, Role.OTHER]
Common = Annotated[T, COMMON]

_DECIDING = (
    *("neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last", "num_train_epochs", "max_steps"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "tf32"),
)
#: Marks of keys of TrainingArguments, which cannot carry any. Some others MRPOConfig declares anew, with a mark.
INHERITED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_DECIDING, (Role.DECIDES,)),
    **dict.fromkeys(("seed", "data_seed", "fp16"), (Role.DECIDES, COMMON)),
    "output_dir": (Role.PLACE, COMMON),
    "logging_dir": (Role.PLACE,),
}


def marks_of(keys: type) -> dict[str, tuple[Any, ...]]:
    """{key: its marks} of a dataclass of keys; of inherited keys those of ``INHERITED``."""
    hints = get_type_hints(keys, include_extras=True)
    own = {key: hint.__metadata__ for key, hint in hints.items() if get_origin(hint) is Annotated}
    return {key: own.get(key, INHERITED.get(key, ())) for key in hints}


def keys_with(keys: type, mark: object) -> tuple[str, ...]:
    """The keys that bear a mark."""
    return tuple(key for key, marks in marks_of(keys).items() if mark in marks)


def keys_unused_by(keys: type, objective: str) -> frozenset[str]:
    """The keys that an objective does not read."""
    marked = ((key, mark) for key, marks in marks_of(keys).items() for mark in marks if isinstance(mark, UsedBy))
    return frozenset(key for key, mark in marked if objective not in mark.objectives)


#: Defaults that HfArgumentParser turns into another value on the way.
_REWRITTEN = {"debug": None, "include_num_input_tokens_seen": False}


def non_default_keys(arguments: Any) -> dict[str, Any]:
    """{key: value} of a dataclass where it differs from the default, tokens left out."""
    values = {}
    for f in fields(arguments):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = getattr(arguments, f.name)
        if value not in (default, _REWRITTEN.get(f.name, default)) and not f.name.endswith("token"):
            values[f.name] = value
    return values
