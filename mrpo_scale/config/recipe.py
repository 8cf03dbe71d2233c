"""YAML recipe and command line to (ScriptArguments, MRPOConfig).

A recipe is turned into command-line words and put in front of the real ones, so both go through one parser: the same types, the
same errors, and the command line wins.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from mrpo_scale.base.errors import ConfigError, refuse
from mrpo_scale.base.untrusted import read_text
from mrpo_scale.config.ds_config import resource
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.trl_keys import remedy_of, take_trl_keys

T = TypeVar("T")


_MOST_BYTES = 1 << 20  #: of a recipe
_MOST_VALUES = 100_000
_MERGE = "tag:yaml.org,2002:merge"
_UNFINISHED = -1


def _bool_or_word(text: str) -> str | bool:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text  # auto; MRPOConfig refuses the others


class _Parser(HfArgumentParser):
    def __init__(self, kinds: Sequence[Any], **options: Any) -> None:
        super().__init__(kinds, **options)
        if "--bf16" in self._option_string_actions:  # the library's parser knows no bool that may also be a word
            self._option_string_actions["--bf16"].type = _bool_or_word

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not the last one's win. A key may override one that ``<<`` merges in."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _check_nodes(node, {}) > _MOST_VALUES:
            raise ConfigError(f"its aliases stand for more than {_MOST_VALUES} values; write out what they mean.")
        return node


def _check_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node has once every alias is written out: a few lines can stand for more than any memory holds.

    Args:
        known: sizes of the nodes that were seen, by identity.

    Raises:
        ConfigError: a key is given twice, or an alias stands inside what it names.
    """
    if known.setdefault(id(node), _UNFINISHED) != _UNFINISHED:
        return known[id(node)]
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ConfigError(f"key `{twice}` is given twice; leave one.")
        children = [one for pair in node.value for one in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    if any(known.get(id(child)) == _UNFINISHED for child in children):
        raise ConfigError("an alias stands inside the value that it names, which has no end; write out what it means.")
    known[id(node)] = 1 + sum(_check_nodes(child, known) for child in children)
    return known[id(node)]


def find_recipe(config: str) -> Path:
    """A path as given, or the name of a recipe that comes with the package."""
    shipped = resource("recipes")
    for path in (Path(config), shipped / config, shipped / f"{config}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise ConfigError(f"`--config {config}` is no file and no recipe of the package; the recipes are {names}.")


def read_recipe(path: Path) -> dict[str, Any]:
    """A YAML file's flat mapping. Raises ConfigError where it is none."""
    try:
        text = read_text(path, _MOST_BYTES)
    except ValueError as error:
        raise ConfigError(f"{path} {error}; name a YAML recipe.") from None
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(
            f"{path} is not valid YAML: its values are nested too deep; a recipe is a flat mapping."
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number or a date that Python has no value for
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}; correct the file.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, got {type(values).__name__}.")
    return values


def parse(
    argv: Sequence[str], config: type[MRPOConfig] = MRPOConfig, prog: str = "mrpo train", suffix: str = ""
) -> tuple[ScriptArguments, MRPOConfig]:
    """Words of the command line, ``--config RECIPE`` among them, to checked arguments.

    Args:
        prog, suffix: of another command than `mrpo train`: its name, and what it adds to a recipe's name for an ``output_dir`` of
            its own.

    Raises:
        ConfigError: unknown keys, values of another type, contradictions: of the keys all, each with its remedy.
    """
    # MRPOConfig has __post_init__ checks that need every value, so it is built once, by the parser.
    parser = _Parser([ScriptArguments, config], allow_abbrev=False, prog=prog)
    argv = list(argv)
    recipe: Path | None = None
    for i, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            value = word.removeprefix("--config=") if "=" in word else "".join(argv[i + 1 : i + 2])
            recipe = find_recipe(value)
            del argv[i : i + (1 if "=" in word else 2)]
            break
    given, problems = take_trl_keys(read_recipe(recipe)) if recipe else ({}, [])
    from_recipe = []
    for key, value in given.items():
        try:
            from_recipe += _recipe_words(parser, key, value)
        except ConfigError as error:
            problems.append(str(error))
    problems = [f"{recipe}: {problem}" if i == 0 else problem for i, problem in enumerate(problems)]
    if not {"-h", "--help"} & set(argv):
        problems += _unknown_words(parser, argv)
    refuse(problems)
    argv = [*from_recipe, *argv]
    if recipe and "--output_dir" not in argv and not any(w.startswith("--output_dir=") for w in argv):
        argv += ["--output_dir", str(Path("runs") / (recipe.stem + suffix))]
    parsed = parser.parse_args_into_dataclasses(argv)
    return parsed[0], parsed[1]


def parse_keys(keys: type[T], argv: Sequence[str], prog: str) -> T:
    """Words of a command line without a recipe, to a checked dataclass.

    Raises:
        ConfigError: unknown keys, wrong type, contradiction.
    """
    parser = _Parser([keys], allow_abbrev=False, prog=prog)
    refuse(_unknown_words(parser, argv))  # before the dataclass makes its own complaints
    return parser.parse_args_into_dataclasses(list(argv))[0]


def _recipe_words(parser: _Parser, key: str, value: Any) -> list[str]:
    """One key of a recipe as the command line would carry it. An empty value becomes the key's default, where that may be None.

    Raises:
        ConfigError: no such key, or a value that it cannot have.
    """
    action = parser._option_string_actions.get(f"--{key}")
    if action is None:
        raise ConfigError(_unknown(key, parser))
    if value is None:
        if key not in may_be_empty():
            raise ConfigError(f"`{key}` is empty; give it a value, or remove the key.")
        parser.set_defaults(**{key: None})
        return []
    if value is False and action.type not in (string_to_bool, _bool_or_word):
        # YAML's `no`, unquoted, of a key whose values are words.
        value = next((word for word in ("no", "none", "false") if word in (action.choices or ("none",))), value)
    if isinstance(value, list) and action.nargs is None:
        # A key that is a word or a list of words, of which the command line can only say the first: `report_to`.
        parser.set_defaults(**{key: value})
        return []
    argv = _as_words({key: value})
    parser.parse_known_args(argv)
    return argv


def may_be_empty() -> set[str]:
    """Keys of which None is a value."""
    hints = {**get_type_hints(ScriptArguments), **get_type_hints(MRPOConfig)}
    kinds = [*fields(ScriptArguments), *fields(MRPOConfig)]
    optional = {name for name, hint in hints.items() if type(None) in get_args(hint)}
    return {"dtype"} | optional | {field.name for field in kinds if field.default is None}


def wrong_values(values: Mapping[str, Any]) -> dict[str, str]:
    """{key: what is wrong} of the keys of a recipe that are unknown or whose values are of another kind, each by itself."""
    parser = _Parser([ScriptArguments, MRPOConfig], allow_abbrev=False, prog="mrpo train")
    wrong = {}
    for key, value in values.items():
        try:
            _recipe_words(parser, key, value)
        except ConfigError as error:
            wrong[key] = str(error).rstrip(".")
    return wrong


def _unknown_words(parser: _Parser, argv: Sequence[str]) -> list[str]:
    _, rest = parser.parse_known_args(list(argv))
    keys = [word for word in rest if word.startswith("--")] or rest[:1]
    return [_unknown(key.lstrip("-").split("=")[0], parser) for key in keys]


def _as_words(values: dict[str, Any]) -> list[str]:
    """Values as the command line would carry them: mappings as JSON, scalars joined by ``=`` so that -1e-3 is no option."""
    argv: list[str] = []
    for key, value in values.items():
        if isinstance(value, list) and value:
            argv += [f"--{key}", *(_as_word(item) for item in value)]
        elif value is not None and value != []:
            argv.append(f"--{key}={_as_word(value)}")
    return argv


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _unknown(key: str, parser: _Parser) -> str:
    if remedy := remedy_of(key):
        return f"`{key}` is no key here: {remedy}."
    known = {option.lstrip("-") for option in parser._option_string_actions}
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else f"; see `{parser.prog} --help`.")
