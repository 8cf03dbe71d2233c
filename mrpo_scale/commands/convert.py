"""`mrpo convert`: another trainer's DPO recipe, YAML or command line, in this project's keys, and what could not be carried."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import read_text
from mrpo_scale.config.elsewhere import ConfigElsewhere
from mrpo_scale.config.foreign import Conversion, Trainer, convert_keys
from mrpo_scale.config.foreign_keys import TRAINERS
from mrpo_scale.config.recipe import parse, read_recipe, wrong_values
from mrpo_scale.config.trl_keys import taken_keys

HELP = f"""usage: mrpo convert FILE [--from {"|".join(TRAINERS)}|auto] [--gpus N] [--output FILE]

Writes the DPO recipe of another trainer (a YAML file, or the text of a shell script that starts one) in this project's keys: to the
screen, or to --output. What it could not carry is listed, with the reason; so is what needs no counterpart. Recipes of TRL and
alignment-handbook need no conversion.

  --from    whose recipe it is; auto tells it by its keys or by the program that the script starts
  --gpus    of the run, for OpenRLHF, which names the pairs of a step over all of them
"""
_MOST_BYTES = 1 << 20
_END = {"&&", "||", "&", ";", "|", ">", ">>", "2>&1", ")"}


def convert(argv: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ConfigError: the file cannot be read, is of no trainer that is known, or is no DPO recipe.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    flags = _parse_flags(argv)
    if flags.output and flags.output.exists():
        raise ConfigError(f"`--output {flags.output}` is there already; name another file.")
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to the screen that the recipe is written to
        trainer, done, text = _convert(flags)
    if flags.output:
        flags.output.write_text(text)
    else:
        print(text)
    _say(done, trainer, flags.output)
    return 0


def _convert(flags: argparse.Namespace) -> tuple[Trainer, Conversion, str]:
    trainer, given, unresolved = read_foreign(flags.file, flags.trainer)
    done = convert_keys(trainer, given, taken_keys(), flags.gpus)
    done.lost += [f"`{key}: {value}`: a variable of the shell; write its value" for key, value in unresolved.items()]
    for key, reason in wrong_values(done.values).items():
        done.lose(key, done.values.pop(key), reason)
    text = as_recipe(done, flags.file, trainer)
    check_parses(text)
    return trainer, done, text


def _parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mrpo convert", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("--from", dest="trainer", choices=["auto", *TRAINERS], default="auto")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--output", type=Path)
    try:
        flags, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"mrpo convert: {error}.") from None
    if unknown or (flags.gpus is not None and flags.gpus < 1):
        raise ConfigError(
            f"mrpo convert: `{unknown[0] if unknown else f'--gpus {flags.gpus}'}` is not known; see `mrpo convert --help`."
        )
    return flags


def read_foreign(file: Path, name: str = "auto") -> tuple[Trainer, dict[str, Any], dict[str, str]]:
    """Whose recipe a file is, its keys, and those whose values are variables of the shell.

    Raises:
        ConfigError: it cannot be read, or is of no trainer in the table.
    """
    try:
        text = read_text(file, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; name a YAML file or a shell script.") from None
    for trainer in TRAINERS.values() if name == "auto" else [TRAINERS[name]]:
        if (command := _command(text, trainer)) is not None:
            return trainer, *_split_unresolved(command)
    if file.suffix not in (".yaml", ".yml"):
        programs = ", ".join(trainer.title for trainer in TRAINERS.values())
        raise ConfigError(f"{file} starts no DPO training of {programs}; name a YAML file or a script that does.")
    values = read_recipe(file)
    if name != "auto":
        return TRAINERS[name], values, {}
    found = max(TRAINERS.values(), key=lambda trainer: len(set(trainer.marks) & set(values)))
    if not set(found.marks) & set(values):
        raise ConfigError(
            f"{file} has no key of {', '.join(t.title for t in TRAINERS.values())} alone; say whose it is with `--from`."
        )
    return found, values, {}


def _command(text: str, trainer: Trainer) -> dict[str, Any] | None:
    """Keys and values of the line that starts a trainer's DPO program; None where there is none."""
    for line in text.replace("\\\n", " ").splitlines():
        found = None if line.lstrip().startswith("#") else re.search(rf"(?:^|\s|/)(?:{trainer.program})(?=\s|$)", line)
        if found and "--" in line[found.end() :]:
            return _keys(_resolve(line[found.end() :], text))
    return None


def _resolve(line: str, text: str) -> str:
    """``line`` with the variables that the script sets to plain values."""
    plain = dict(re.findall(r"""^\s*(?:export\s+)?(\w+)=["']?([^\s"'$`()]+)["']?\s*(?:#.*)?$""", text, re.MULTILINE))
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: plain.get(found[1] or found[2], found[0]), line)


def _keys(line: str) -> dict[str, Any]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"the command line cannot be read: {error}; correct its quotes.") from None
    end = next((i for i, word in enumerate(words) if word in _END or word.endswith(";")), len(words))
    keys: dict[str, list[str]] = {}
    key = ""
    for word in words[:end]:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            keys[key] = [value] if value else []
        elif key:
            keys[key].append(word)
    return {key: _value(values) for key, values in keys.items()}


def _value(words: Sequence[str]) -> Any:
    """No word is a switch that is on; words are read as YAML would read them."""
    if not words:
        return True
    values = [yaml.safe_load(word) if re.fullmatch(r"[\w.+-]+", word) else word for word in words]
    return values[0] if len(values) == 1 else values


def _split_unresolved(keys: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    unresolved = {key: str(value) for key, value in keys.items() if re.search(r"[$`]", str(value))}
    return {key: value for key, value in keys.items() if key not in unresolved}, unresolved


def as_recipe(done: Conversion, file: Path, trainer: Trainer) -> str:
    """The recipe as YAML, with what was not carried as comments."""
    head = [f"Converted by `mrpo convert` from {file.name}, a recipe of {trainer.title}'s."]
    head += ["Not carried:", *(f"  {line}" for line in done.lost)] if done.lost else []
    lines = [f"# {' '.join(line.split()) if not line.startswith('  ') else line}" for line in head]
    recipe = yaml.safe_dump(done.values, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*lines, "", "ref_models: []  # references beside the policy's own starting weights", recipe])


def check_parses(text: str) -> None:
    """Raises ConfigError where a recipe, as text, does not parse; what this machine lacks says nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "converted.yaml"
        file.write_text(text)
        try:
            parse(["--config", str(file)], ConfigElsewhere)
        except ConfigError as error:
            raise ConfigError(f"the recipe contradicts itself: {str(error).removeprefix(f'{file}: ')}") from None


def _say(done: Conversion, trainer: Trainer, output: Path | None) -> None:
    lines = [f"{len(done.values)} keys carried from {trainer.title}" + (f", in {output}" if output else "")]
    lines += (
        ["needs no counterpart:", *(f"  {key}: {reason}" for key, reason in done.needless.items())]
        if done.needless
        else []
    )
    lines += ["NOT CARRIED:", *(f"  {line}" for line in done.lost)] if done.lost else ["everything is carried"]
    print("\n".join(lines), file=sys.stderr)
