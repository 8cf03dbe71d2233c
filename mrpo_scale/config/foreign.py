"""What other trainers' DPO keys are here: what all their tables share, and how a conversion goes through one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.ds_config import resource
from mrpo_scale.config.mixtures import with_subset
from mrpo_scale.config.trl_keys import asks_for_nothing, take_trl_keys

Keys = dict[str, Any]

#: Of every trainer: keys that cannot be carried, with the reason.
LOST = {
    **dict.fromkeys(
        ("load_in_8bit", "quantization_bit", "quant_bits"),
        "frozen weights beside an adapter are quantized to 4 bits or not at all",
    ),
    **dict.fromkeys(("fsdp", "fsdp_config"), "the policy is sharded by DeepSpeed ZeRO-3: `deepspeed: zero3`"),
    "use_liger_kernel": "Liger replaces the forward that scores pairs; the fused head here does its work already",
}


# Reasons that several trainers' tables share.
ANALYSED = "the layout of the rows is recognised"
TEMPLATE = "each model is read with the chat template of its own folder; to use another one, `chat_template: FILE`"
TOKENIZER = "each model is read with its own tokenizer"
FAST = "fast tokenizers are used"
CACHED = "tokens and pairs are kept beside the data"
PACKED = "pairs are packed without padding already"
CURVES = "curves are always drawn"
OWN_SERVICE = "a service of its own cluster"
WANDB = "wandb reads it from the environment (WANDB_ENTITY, WANDB_PROJECT, ...)"
COLUMNS = "rename the column in the data"
NO_REFERENCE = "that loss has no reference, which is what this project is about"


@dataclass
class Conversion:
    """What became of a recipe: keys here, keys that need no counterpart and why, and what could not be carried and why."""

    values: Keys = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def lose(self, key: str, value: Any, reason: str) -> None:
        self.lost.append(f"`{key}: {value}`: {reason}")

    def losses(self, kind: str, more: Mapping[str, Any], factor: float = 1.0) -> None:
        """`loss_type` and `loss_weights` of a loss with its factor and of terms beside it, {name: factor}."""
        terms = {name: float(weight) for name, weight in more.items() if weight}
        self.values["loss_type"] = [kind, *terms] if terms else kind
        if terms:
            self.values["loss_weights"] = [factor, *terms.values()]

    def add_sets(self, entries: Sequence[Keys]) -> None:
        self.values["dataset_name"] = (
            entries[0]["name"] if len(entries) == 1 and set(entries[0]) == {"name"} else list(entries)
        )


@dataclass(frozen=True)
class Trainer:
    """One other trainer.

    Args:
        marks: keys by which its YAML is told from others'.
        program: pattern of the program of its command lines.
        make: takes out of the keys what it makes several keys of, or what depends on several.
        renamed: its name of a key -> the name here.
        needless: keys that need no counterpart, with the reason. A name that ends in `*` stands for all that begin so.
        lost: keys that cannot be carried, with the reason.
    """

    title: str
    marks: tuple[str, ...]
    program: str
    make: Callable[[Keys, Conversion, int | None], None]
    renamed: Mapping[str, str]
    needless: Mapping[str, str]
    lost: Mapping[str, str]


def convert_keys(
    trainer: Trainer, given: Mapping[str, Any], ours: frozenset[str], gpus: int | None = None
) -> Conversion:
    """A recipe of another trainer in the keys of this one.

    Args:
        ours: the names of this project's keys, and of those that TRL's are taken as.
        gpus: of the run, for trainers that name the pairs of a step over all of them.

    Raises:
        ConfigError: it is no DPO recipe.
    """
    done = Conversion()
    rest = dict(given)
    trainer.make(rest, done, gpus)
    for key, value in rest.items():
        reason = _reason(key, trainer.needless)
        if value is None or value == "":
            done.needless[key] = "is empty"
        elif reason:
            done.needless[key] = reason
        elif key in trainer.renamed:
            done.values[trainer.renamed[key]] = value
        elif value is False and key not in ours:
            done.needless[key] = "is off"
        elif (lost := _reason(key, trainer.lost) or LOST.get(key)) and value is not False:
            done.lose(key, value, lost)
        elif key in ours:
            done.values[key] = value
        else:
            done.lose(key, value, f"unknown here and in this table of {trainer.title}'s keys")
    kept, problems = take_trl_keys(done.values)
    for key in done.values:
        if asks_for_nothing(key) and key not in kept and not any(f"`{key}" in problem for problem in problems):
            done.needless[key] = "asks for nothing that is not done anyway"
    done.values = kept
    done.lost += problems
    return done


def _reason(key: str, table: Mapping[str, str]) -> str | None:
    return table.get(key) or next(
        (why for name, why in table.items() if name.endswith("*") and key.startswith(name[:-1])), None
    )


def choose(key: str, value: Any, words: Mapping[str, str | None], refused: str) -> str:
    """The word here for another trainer's word.

    Raises:
        ConfigError: it is none of those that can be carried.
    """
    found = words.get(str(value))
    if found is None:
        raise ConfigError(f"`{key}: {value}`: {refused}; what can be carried: {', '.join(words)}.")
    return found


def sets_with_parts(parts: Mapping[str, Any], splits: Sequence[str] = ()) -> list[Keys]:
    """Entries of `dataset_name`; of a single split, or of one for each set."""
    entries = [with_subset({"name": name}, part) for name, part in parts.items()]
    if not splits:
        return entries
    each = list(splits) * (len(entries) if len(splits) == 1 else 1)
    return [
        {**entry, "split": split} if split != "train" else entry for entry, split in zip(entries, each, strict=False)
    ]


def take_deepspeed(rest: Keys, done: Conversion) -> None:
    """A DeepSpeed file of another project's folder, by the name that this package has for it."""
    value = rest.pop("deepspeed", None)
    name = str(value).rsplit("/", 1)[-1].removesuffix(".json").removesuffix("_bf16")
    name = {"ds_z3_config": "zero3", "ds_z2_config": "zero2"}.get(name, name)
    known = [path.stem for path in resource("ds_configs").glob("*.json")]
    if name in known:
        done.values["deepspeed"] = name
    elif value:
        done.lose("deepspeed", value, f"name your copy of that file, or one of {', '.join(sorted(known))}")


#: Keys of data that two trainers have under the same names, and what to do instead.
OF_DATA = {
    "eval_dataset": "name a split of the data with `dataset_test_split`",
    "max_samples": "write it as `subset` of each set of `dataset_name`",
}
#: Keys of an adapter, and their names elsewhere.
_ADAPTER = {
    "lora_r": ("lora_rank",),
    "lora_alpha": (),
    "lora_dropout": (),
    "lora_target_modules": ("lora_target", "target_modules"),
    "lora_modules_to_save": ("modules_to_save", "additional_target"),
    "use_rslora": ("peft_use_rslora",),
    "use_dora": ("peft_use_dora",),
}
_ALL_LINEAR = ("all", "all-linear", "all_linear")


def take_adapter(rest: Keys, done: Conversion, on: bool, *, alpha_per_rank: float | None = None) -> None:
    """LoRA's keys, by whichever of their names.

    Args:
        on: whether the recipe trains an adapter.
        alpha_per_rank: the trainer's own `lora_alpha` of a recipe that names the rank alone.
    """
    given: Keys = {}
    for key, names in _ADAPTER.items():
        for name in (key, *names):
            value = rest.pop(name, None)
            if value not in (None, "", False):
                given[key] = value
    if rest.pop("lora_target_linear", False):
        given["lora_target_modules"] = "all-linear"
    four_bits = [key for key in ("quantization_bit", "quant_bits") if str(rest.get(key)) == "4"]
    if not on:
        done.needless |= dict.fromkeys(given, "no adapter is trained")
        return
    for key in four_bits:
        rest.pop(key)
        given["load_in_4bit"] = True
    for key in ("lora_target_modules", "lora_modules_to_save"):
        if isinstance(given.get(key), str):
            words = [word.strip() for word in given[key].split(",")]
            given[key] = ["all-linear" if word in _ALL_LINEAR else word for word in words]
    if alpha_per_rank is not None and "lora_r" in given:
        given.setdefault("lora_alpha", int(alpha_per_rank * given["lora_r"]))
    for key in ("lora_r", "lora_alpha"):
        if key not in given:
            done.lose(key, "not given", "every trainer has a default of its own; write it")
    done.values |= {"use_peft": True, **given}


def take_number(rest: Keys, key: str, default: float = 0.0) -> float:
    """A key's number, taken out; ``default`` where it is empty. Raises ConfigError where it is none."""
    value = rest.pop(key, None)
    try:
        return default if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"`{key}: {value}` must be a number.") from None
