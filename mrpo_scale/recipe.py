"""YAML recipe and command line to (ScriptArguments, MRPOConfig).

A recipe is turned into command-line words and put in front of the real ones, so both go through one parser: the same types, the
same errors, and the command line wins.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from mrpo_scale.config import MRPOConfig, ScriptArguments
from mrpo_scale.errors import ConfigError
from mrpo_scale.untrusted import read_text

_FULL_FINETUNING = "this project finetunes all weights"
# TRL keys that have no counterpart here: the values that ask for nothing, and what to say of all others.
TRL_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_peft": ((False,), _FULL_FINETUNING),
    "load_in_4bit": ((False,), _FULL_FINETUNING),
    "load_in_8bit": ((False,), _FULL_FINETUNING),
    "precompute_ref_log_probs": ((False,), ""),  # true: see _without_trl
    "precompute_ref_batch_size": ((None,), "use `ref_tokens_per_forward`"),
    "truncation_mode": (("keep_start",), "long responses are cut at their end, as TRL's keep_start does"),
    "padding_free": ((False, True), ""),
    "pad_to_multiple_of": (("auto", None), "pairs are packed into rows without padding to a multiple"),
    "loss_weights": ((None,), "one outer loss is supported"),
    "ld_alpha": ((None, 1.0), "length desensitisation is not supported"),
    "f_divergence_type": (("reverse_kl",), "only reverse KL is supported"),
    "f_alpha_divergence_coef": ((0.5,), "only reverse KL is supported"),
    "use_weighting": ((False,), "WPO weighting is not supported"),
    "discopop_tau": ((0.05,), "loss_type discopop is not supported"),
    "sync_ref_model": ((False,), "references are frozen"),
    "ref_model_mixup_alpha": ((0.6,), "references are frozen"),
    "ref_model_sync_steps": ((512,), "references are frozen"),
    "router_aux_loss_coef": ((None, 0.0), "no auxiliary loss is added"),
    "activation_offloading": ((False,), "use `gradient_checkpointing: true`"),
    "dataset_streaming": (
        (False,),
        "data sets of any size are written to disk as Arrow files once and memory-mapped, so memory stays small without it",
    ),
    "ignore_bias_buffers": ((False,), "there is nothing to ignore"),
    "model_init_kwargs": ((None,), "use `dtype`, `attn_implementation`, `model_revision`"),
    "pad_token": ((None,), "padding is masked, no token is needed"),
    "lora_r": ((16,), _FULL_FINETUNING),
    "lora_alpha": ((32,), _FULL_FINETUNING),
    "lora_dropout": ((0.05,), _FULL_FINETUNING),
    "lora_target_modules": ((None,), _FULL_FINETUNING),
    "lora_target_parameters": ((None,), _FULL_FINETUNING),
    "lora_modules_to_save": ((None,), _FULL_FINETUNING),
    "lora_task_type": (("CAUSAL_LM",), _FULL_FINETUNING),
    "use_rslora": ((False,), _FULL_FINETUNING),
    "use_dora": ((False,), _FULL_FINETUNING),
    "bnb_4bit_quant_type": (("nf4",), _FULL_FINETUNING),
    "use_bnb_nested_quant": ((False,), _FULL_FINETUNING),
    "bnb_4bit_quant_storage": ((None,), _FULL_FINETUNING),
}
RENAMED_TRL_KEYS = {"torch_dtype": "dtype", "chat_template_path": "chat_template"}
T = TypeVar("T")


_MOST_BYTES = 1 << 20  #: of a recipe
_MOST_VALUES = 100_000
_MERGE = "tag:yaml.org,2002:merge"
_UNFINISHED = -1


class _Parser(HfArgumentParser):
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


def resource(kind: str) -> Path:
    """Folder of the recipes, accelerate configs (``launch/accelerate``) or ds_configs: in the clone, or as installed."""
    here = Path(__file__).parent
    return here / kind if (here / kind).is_dir() else here.parent / kind


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


def parse(argv: Sequence[str]) -> tuple[ScriptArguments, MRPOConfig]:
    """Words of the command line, ``--config RECIPE`` among them, to checked arguments.

    Raises:
        ConfigError: unknown key, wrong type, contradiction.
    """
    # MRPOConfig has __post_init__ checks that need every value, so it is built once, by the parser.
    parser = _Parser([ScriptArguments, MRPOConfig], allow_abbrev=False, prog="mrpo train")  # type: ignore[list-item]
    words = list(argv)
    recipe: Path | None = None
    for i, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            value = word.removeprefix("--config=") if "=" in word else "".join(words[i + 1 : i + 2])
            recipe = find_recipe(value)
            del words[i : i + (1 if "=" in word else 2)]
            break
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    values = _without_trl(read_recipe(recipe)) if recipe else {}
    for key in values:
        if key not in known:
            raise ConfigError(f"{recipe}: {_unknown(key, known)}")
    parser.set_defaults(**{key: None for key, value in values.items() if value is None})
    words = [*_as_words(values), *words]
    if recipe and "--output_dir" not in words and not any(w.startswith("--output_dir=") for w in words):
        words += ["--output_dir", str(Path("runs") / recipe.stem)]
    *parsed, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if rest:
        key = next((w for w in rest if w.startswith("--")), rest[0])
        raise ConfigError(_unknown(key.lstrip("-").split("=")[0], known))
    return parsed[0], parsed[1]


def parse_keys(keys: type[T], words: Sequence[str], prog: str) -> T:
    """Words of a command line without a recipe, to a checked dataclass.

    Raises:
        ConfigError: unknown key, wrong type, contradiction.
    """
    parser = _Parser([keys], allow_abbrev=False, prog=prog)  # type: ignore[list-item]
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    _, rest = parser.parse_known_args(list(words))  # before the dataclass makes its own complaints
    if rest:
        key = next((word for word in rest if word.startswith("--")), rest[0])
        raise ConfigError(_unknown(key.lstrip("-").split("=")[0], known, prog))
    return parser.parse_args_into_dataclasses(list(words))[0]


def _without_trl(values: dict[str, Any]) -> dict[str, Any]:
    """Drop TRL keys that ask for nothing, rename those with another name here, refuse those that ask for something."""
    kept = {}
    for key, value in values.items():
        if key == "precompute_ref_log_probs" and value is True:
            kept["ref_scoring"] = "precompute"
        elif key in RENAMED_TRL_KEYS:
            kept[RENAMED_TRL_KEYS[key]] = value
        elif key not in TRL_KEYS:
            kept[key] = value
        elif value not in TRL_KEYS[key][0]:
            raise ConfigError(f"TRL's `{key}: {value}` has no counterpart: {TRL_KEYS[key][1]}. Remove the key.")
    return kept


def _as_words(values: dict[str, Any]) -> list[str]:
    """Values as the command line would carry them: mappings as JSON, scalars joined by ``=`` so that -1e-3 is no option."""
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, list) and value:
            words += [f"--{key}", *(_as_word(item) for item in value)]
        elif value is not None and value != []:
            words.append(f"--{key}={_as_word(value)}")
    return words


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _unknown(key: str, known: set[str], prog: str = "mrpo train") -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else f"; see `{prog} --help`.")
