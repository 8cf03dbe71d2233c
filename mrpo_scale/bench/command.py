"""`mrpo bench`: plan the arms, take the steps, and say what each of them cost."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NoReturn

import torch

from mrpo_scale.base.device import device_name, peak_flops
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.ranks import all_gather_object, world_group
from mrpo_scale.bench.arms import Arm, plan_arms, plan_steps
from mrpo_scale.bench.results import summarise
from mrpo_scale.bench.show import plot, tables
from mrpo_scale.bench.synthetic import parse_sizes, random_models, random_pairs
from mrpo_scale.bench.trainer import BenchTrainer
from mrpo_scale.commands.train import release
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.model_spec import ModelSpec, parse_ref_models
from mrpo_scale.config.recipe import parse
from mrpo_scale.data.inputs import read_rows
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.models.plan import load_tokenizer
from mrpo_scale.training.preflight import preflight

logger = logging.getLogger(__name__)

#: Put behind the recipe's own keys: nothing but steps. The optimizer works in full and moves nothing: see bench/trainer.py.
_STEPS_ALONE = {
    "learning_rate": "0",
    "logging_strategy": "steps",
    "logging_steps": "1",
    "report_to": "none",
    "eval_strategy": "no",
    "eval_on_start": "false",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "push_to_hub": "false",
    "num_train_epochs": "1",
}


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"mrpo bench: {message}.")


def bench(argv: Sequence[str]) -> None:
    """Run the command. Collective over the world.

    Raises:
        ConfigError, TrainingError: see errors.py.
    """
    flags, rest = _flags().parse_known_args(list(argv))
    _check(flags)
    script, config = parse([*rest, *(f"--{key}={value}" for key, value in _STEPS_ALONE.items())])
    if config.use_peft:
        raise ConfigError("`use_peft: true`: mrpo bench measures the training of all weights; remove the key.")
    arms = plan_arms(flags.references, flags.scoring, flags.placement or [config.ref_placement])
    ref_models: list[Any] = _ref_models(script, arms[-1].references, flags.repeat_references)
    sizes = None if flags.random_weights is None else parse_sizes(flags.random_weights)
    _adapt(config, arms, flags)
    preflight(config, ref_models)
    rows, _ = read_rows(script, config)
    model, ref_models = resolve(str(script.model_name_or_path)), [resolve(reference) for reference in ref_models]
    if sizes is not None:
        specs = [ModelSpec(model, revision=config.model_revision), *parse_ref_models(ref_models)]
        policy, *ref_models = random_models(specs, sizes, config)
        model, config.model_revision = policy["model"], None
    if flags.random_pairs:
        count = flags.steps * config.window_size
        rows = random_pairs(load_tokenizer(ModelSpec(model)), count, flags.random_pairs, config.seed)
    trainer = BenchTrainer(
        model,
        ref_models=ref_models,
        args=config,
        train_dataset=rows,
        arms=arms,
        rounds=flags.steps,
        plan_steps=partial(_steps, arms, flags.steps, config.seed),
    )
    trainer.train()
    everybody = all_gather_object((trainer.measured, trainer.surveys), world_group())
    if config.process_index == 0:
        figures = summarise(arms, everybody, peak_flops(config.device))
        _report(_result(trainer, rest, figures, flags), config.folder)
    trainer.forget_arms()
    release(trainer)


def _flags() -> argparse.ArgumentParser:
    parser = _Flags(prog="mrpo bench", add_help=False, allow_abbrev=False)
    parser.add_argument("--references", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--scoring", nargs="+", choices=("live", "cached"), default=["live", "cached"])
    parser.add_argument("--placement", nargs="+", choices=("spread", "partition"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--repeat_references", action="store_true")
    parser.add_argument("--random_weights", nargs="*", metavar="KEY=NUMBER")
    parser.add_argument("--random_pairs", nargs=2, type=int, metavar=("PROMPT", "RESPONSE"))
    parser.add_argument("--output", type=Path)
    return parser


def _check(flags: argparse.Namespace) -> None:
    if min(flags.references) < 1:
        raise ConfigError(f"`--references {min(flags.references)}`: a run has at least 1, the anchor, which is DPO.")
    if flags.steps < 5:
        raise ConfigError(f"`--steps {flags.steps}`: an interval needs at least 5 timed steps of each arm.")


def _ref_models(script: ScriptArguments, most: int, repeat: bool) -> list[str]:
    """``ref_models`` of the arm with most references; the others take the first of them."""
    have = script.ref_models
    if most <= 1 + len(have):
        return have[: most - 1]
    if not repeat:
        names = f" ({', '.join(have)})" if have else ""
        raise ConfigError(
            f"`--references {most}`: the recipe has {1 + len(have)}: the anchor and {len(have)} `ref_models`{names}; name more "
            f"there, ask for at most {1 + len(have)}, or add --repeat_references, which loads the same models several times to "
            "measure their cost."
        )
    again = have or [str(script.model_name_or_path)]
    logger.info("--repeat_references: K=%d is reached by loading %s again", most, ", ".join(again))
    return list(islice(cycle(again), most - 1))


def _steps(arms: Sequence[Arm], rounds: int, seed: int, windows: int, heaviest: int) -> list[Any]:
    return plan_steps(arms, rounds, windows, heaviest, seed)


def _adapt(config: MRPOConfig, arms: Sequence[Arm], flags: argparse.Namespace) -> None:
    """What the arms of one trainer need, said where it is not the recipe's own."""
    config.output_dir = str(flags.output or config.folder / "bench")
    config.max_steps = len(_steps(arms, flags.steps, config.seed, 1, 0))
    if config.samples:
        logger.info(
            "objective %s: what references cost is measured on labelled pairs, without samples", config.objective
        )
    if config.samples or (config.objective == "dpo" and len(arms) > 1):
        config.objective = "mrpo"
    config.weights_split = None
    if list(config.ref_weights) not in (["confidence"], ["uniform"]):
        logger.info("ref_weights: %s fits one K only; measured with uniform", " ".join(map(str, config.ref_weights)))
        config.ref_weights = ["uniform"]


def _result(
    trainer: BenchTrainer, argv: Sequence[str], arms: list[dict[str, Any]], flags: argparse.Namespace
) -> dict[str, Any]:
    args = trainer.args
    packages = ("mrpo-scale", "torch", "transformers", "accelerate", "deepspeed")
    return {
        "machine": {
            "name": device_name(args.device),
            "device": args.device.type,
            "ranks": args.world_size,
            "threads_per_rank": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "recipe": _recipe_name(argv),
        "words": list(argv),
        "random_weights": flags.random_weights,
        "random_pairs": flags.random_pairs,
        "models": {
            "policy": {"path": trainer.whole_run.plan.policy.path, "parameters": trainer.num_parameters},
            "references": [
                {"name": r.name, "path": r.source.path, "dtype": str(r.source.dtype).removeprefix("torch.")}
                for r in trainer.whole_run.plan.references
            ],
        },
        "settings": {
            "precision": "bf16"
            if args.bf16
            else "fp16"
            if args.fp16
            else str(args.policy_dtype).removeprefix("torch."),
            "zero_stage": args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else None,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_checkpointing": args.gradient_checkpointing,
            "max_length": args.max_length,
            "ref_shard_size": args.ref_shard_size,
            "ref_offload": args.ref_offload,
        },
        "rounds": flags.steps,
        "windows": len(trainer.windows),
        "pairs_per_step": trainer.window_size,
        "arms": arms,
    }


def _recipe_name(argv: Sequence[str]) -> str:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--config" or word.startswith("--config="):
            return Path(word.partition("=")[2] or following).stem
    return "command line"


def _report(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, folder / "bench.png")
    print(f"\n{tables(result)}\n\n{folder / 'bench.json'}, {folder / 'bench.png'}", flush=True)
