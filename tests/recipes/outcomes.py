"""`python -m tests.recipes.outcomes`: every public recipe here, with `ref_models` added, trains two steps on tiny models, or stops
naming what is not carried. Minutes; the suite trains some of them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.commands.convert import convert
from mrpo_scale.commands.train import run
from tests.recipes.alignment_handbook import RECIPES
from tests.recipes.local import command_line, made_local
from tests.recipes.test_convert import CASES, not_carried
from tests.tiny import write_models

#: What a machine without GPUs and with few pairs cannot do, and DeepSpeed, which ranks of its own test.
NOT_HERE = ("preprocessing_num_workers", "dataset_num_proc", "deepspeed", "save_steps", "ref_models")
OPTIM = ("--optim=adamw_torch",)  # paged and 8-bit optimizers need a GPU


def outcome(recipe: Mapping[str, Any], folder: Path, models: Mapping[str, str], without: Sequence[str] = ()) -> str:
    folder.mkdir(parents=True)
    kept = {key: value for key, value in recipe.items() if key not in (*NOT_HERE, *without)}
    local = made_local(kept, folder, models["llama"])
    for one in local["dataset_name"] if isinstance(local.get("dataset_name"), list) else ():
        if isinstance(one, dict) and one.get("subset", 0) > 1:
            one["subset"] = 10
    words = [*command_line(local, [models["qwen2"]], folder / "recipe.yaml"), *OPTIM]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(words)
    except ConfigError as error:
        return f"stops: {error}"
    return "trains two steps"


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        models = write_models(Path(root) / "models", hidden_size=64, intermediate_size=128)
        for i, (name, recipe) in enumerate(RECIPES.items()):
            said = outcome(recipe, Path(root) / f"handbook{i}", models)
            if "use_liger_kernel" in said:
                said += " WITHOUT THE KEY: " + outcome(recipe, Path(root) / f"again{i}", models, ["use_liger_kernel"])
            print(f"alignment-handbook  {name:28} {said}", flush=True)
        for i, (name, (file, text, _, _)) in enumerate(CASES.items()):
            (Path(root) / file).write_text(text)
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                convert([str(Path(root) / file), "--gpus", "8"])
            recipe = yaml.safe_load(out.getvalue()[out.getvalue().index("# Converted") :])
            recipe.setdefault("dataset_name", "the/set")  # LLaMA-Factory's names are in a file of its own
            said = outcome(recipe, Path(root) / f"converted{i}", models)
            lost = ", ".join(not_carried(err.getvalue())) or "nothing"
            print(f"mrpo convert        {name:28} {said}; not carried: {lost}", flush=True)


if __name__ == "__main__":
    main()
