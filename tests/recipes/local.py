"""Public recipes made to run here: models and data sets replaced by tiny local ones, and what asks for the hub or a GPU set off on
the command line. All other keys stay as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import pair_rows

ROWS = 24


def data_folder(folder: Path, splits: Sequence[tuple[str, str]], extra: Sequence[str] = ()) -> str:
    """A data set of these (configuration, split), of ROWS pairs each; ``extra`` columns are empty mappings."""
    folder.mkdir(parents=True)
    configs: dict[str, list[dict[str, str]]] = {}
    for seed, (config, split) in enumerate(splits):
        rows = [{**_as_ultrafeedback(row), **{name: {"a": seed} for name in extra}} for row in pair_rows(ROWS, seed)]
        file = f"{config}-{split}.jsonl"
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        configs.setdefault(config, []).append({"split": split, "path": file})
    entries = [
        {"config_name": name, "data_files": files, "default": i == 0} for i, (name, files) in enumerate(configs.items())
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': entries})}---\n")
    return str(folder)


def _as_ultrafeedback(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt as text, and both responses as whole conversations."""
    prompt = row["prompt"]
    return {
        "prompt": prompt[0]["content"],
        "chosen": [*prompt, *row["chosen"]],
        "rejected": [*prompt, *row["rejected"]],
    }


def _splits(recipe: dict[str, Any]) -> dict[str, set[tuple[str, str]]]:
    """{data set: its (configuration, split) that the recipe takes}."""
    wanted: dict[str, set[tuple[str, str]]] = {}
    for one in (recipe.get("dataset_mixture") or {}).get("datasets", ()):
        wanted.setdefault(one["id"], set()).add((one["config"], one["split"]))
    for name in recipe.get("dataset_mixer", ()):
        wanted.setdefault(name, set()).update(("default", split) for split in recipe.get("dataset_splits", ["train"]))
    for one in (
        [recipe["dataset_name"]] if isinstance(recipe.get("dataset_name"), str) else recipe.get("dataset_name") or ()
    ):
        one = {"name": one} if isinstance(one, str) else one
        split = one.get("split") or recipe.get("dataset_train_split", "train")
        wanted.setdefault(one["name"], set()).add((one.get("config") or "default", split))
        if "dataset_test_split" in recipe:
            wanted[one["name"]].add((one.get("config") or "default", recipe["dataset_test_split"]))
    return wanted


def made_local(recipe: dict[str, Any], folder: Path, model: str) -> dict[str, Any]:
    """``recipe`` with a local model, and its data sets written into ``folder``; numbers of pairs are made to fit them."""
    mixture = recipe.get("dataset_mixture") or {}
    extra = [
        c
        for one in mixture.get("datasets", ())[:1]
        for c in one["columns"]
        if c not in ("prompt", "chosen", "rejected")
    ]
    text = json.dumps({**recipe, "model_name_or_path": model})
    for i, (name, splits) in enumerate(sorted(_splits(recipe).items())):
        text = text.replace(json.dumps(name), json.dumps(data_folder(folder / f"set{i}", sorted(splits), extra)))
    local = json.loads(text)
    if "test_split_size" in local.get("dataset_mixture", {}):
        local["dataset_mixture"]["test_split_size"] = 10
    return local


#: On the command line, which wins: no hub, no tracker, no GPU, two steps.
HERE = {
    "bf16": False,
    "use_cpu": True,
    "push_to_hub": False,
    "report_to": "none",
    "attn_implementation": "sdpa",
    "max_length": 256,
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "log_level": "warning",
}


def command_line(recipe: dict[str, Any], references: Sequence[str], file: Path) -> list[str]:
    """``--config FILE`` of the recipe with one line more, ``ref_models``, and what this machine cannot do set off."""
    file.write_text(yaml.safe_dump({**recipe, "ref_models": list(references)}))
    keys = {**HERE, "output_dir": file.parent / "run"}
    said = {key: str(value).lower() if isinstance(value, bool) else value for key, value in keys.items()}
    return ["--config", str(file), *(f"--{key}={value}" for key, value in said.items())]
