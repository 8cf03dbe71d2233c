"""The facts of a run that trains, as the reports take them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerState

from mrpo_scale.config.digest import command_digest, recipe_of
from mrpo_scale.config.keys import ScriptArguments
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.reports.model_card import public
from mrpo_scale.reports.pictures import RunSummary
from mrpo_scale.reports.run_facts import RunFacts, run_name
from mrpo_scale.training.prepare import PreparedRun

_PACKAGES = ("mrpo-scale", "torch", "transformers", "accelerate", "deepspeed", "datasets")


def facts_of(
    run: PreparedRun,
    state: TrainerState,
    script: ScriptArguments | None = None,
    *,
    results: Mapping[str, float],
    best_step: int | None = None,
    comparison: Sequence[RunSummary] = (),
) -> RunFacts:
    """Everything that is known of the run so far.

    Args:
        script: the recipe, where the run was started from one.
        results: metrics of the held-out set for the weights that are saved.
        best_step: the step of those weights, where it is not the last.
        comparison: rows of the table, this run's last.
    """
    args, plan = run.args, run.plan
    stores = zip(plan.names, run.scores.stores, strict=True) if run.scores.stores else ()
    return RunFacts(
        folder=args.folder,
        name=run_name(args.objective, len(plan.names)),
        objective=args.objective,
        step=state.global_step,
        base_model=str(script.model_name_or_path if script else run.policy.name_or_path),
        dataset=[spec.name for spec in script.datasets] if script else "",
        settings=_settings(run, state, best_step),
        references=[(r.name, r.source.path, _version(r.source)) for r in plan.references],
        reference_keys={name: store.identity.key for name, store in stores},
        data={split: {"pairs": len(pairs), **pairs.counts} for split, pairs in run.pair_sets.items()},
        remarks={split: [r.sentence for r in pairs.remarks] for split, pairs in run.pair_sets.items()},
        results=results,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        recipe=recipe_of(script, args),
        command=command_digest(script, args),
        baselines=script.baselines if script else (),
        rows=comparison,
        log=state.log_history,
    )


def _version(source: ReferenceSource) -> str | None:
    """The revision, in how many bits the model was scored where it was quantized, and with which adapter."""
    adapter = f"adapter {public(source.adapter.path)}" if source.adapter else None
    return ", ".join(filter(None, (source.revision, source.quantize, adapter))) or None


def _settings(run: PreparedRun, state: TrainerState, best_step: int | None) -> dict[str, Any]:
    args = run.args
    return {
        "objective": args.objective,
        "beta": args.beta,
        "epsilon_max": args.epsilon_max,
        "clip": args.clip,
        "ref_weights": _weights(run),
        "aggregate": args.aggregate,
        "loss_type": " ".join(args.loss_type),
        "label_smoothing": args.label_smoothing,
        "learning_rate": args.learning_rate,
        "pairs per optimizer step": args.window_size,
        "optimizer steps": state.global_step,
        **({"weights of step": best_step} if best_step else {}),
        "max_length": args.max_length,
    }


def _weights(run: PreparedRun) -> str:
    """As the recipe says, and the numbers that `validation` found."""
    word, found = " ".join(map(str, run.args.ref_weights)), (run.sampler or run).objective.ref_weights
    if run.args.weights_from_validation and not isinstance(found, str):
        return f"{word}: {' '.join(f'{weight:.3f}' for weight in found)}"
    return word
