"""What a run leaves beside its weights: the log, the curves, the model card, the HTML report and what they are made from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mrpo_scale.config.fields import non_default_keys
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.model_spec import parse_ref_models
from mrpo_scale.reports.html_curves import Run
from mrpo_scale.reports.html_report import RUN_FACTS, write_report
from mrpo_scale.reports.model_card import ModelCard
from mrpo_scale.reports.pictures import RunSummary, plot_curves

if TYPE_CHECKING:
    from mrpo_scale.training.trainer import MRPOTrainer

#: Keys of a recipe that say where, not what.
_PLACES = ("output_dir", "logging_dir", "ref_cache_dir", "resume_from_checkpoint", "max_hours", "dataset_num_proc")
#: Never uploaded: people's texts, scores and other models that lie in the same folder. `.gitignore` is what the hub's client obeys.
_PRIVATE = ("bad_rows_*.jsonl", "ref_cache/", "anchor/", "file_hashes/", "training_args.bin")


def run_name(trainer: MRPOTrainer) -> str:
    """As tables and legends call the run: ``DPO``, ``MRPO (K=3)``."""
    objective = trainer.args.objective
    return "DPO" if objective == "dpo" else f"{objective.upper().replace('_', '-')} (K={len(trainer.plan.names)})"


def write_artifacts(trainer: MRPOTrainer, metadata: Mapping[str, Any]) -> None:
    """trainer_state.json, curves.png, README.md, run.json and report.html in ``output_dir``; call on one rank."""
    folder, card = trainer.args.folder, card_of(trainer, metadata)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    title = f"{trainer.args.objective}: {card.base_model}"
    plot_curves(trainer.state.log_history, folder / "curves.png", title=title)
    (folder / "README.md").write_text(card.render(), encoding="utf-8")
    baselines = [f"{name}/" for name in trainer.script.baselines] if trainer.script else []
    (folder / ".gitignore").write_text("".join(f"{pattern}\n" for pattern in (*_PRIVATE, *baselines)))
    _report(trainer, card, "finished")


@contextmanager
def report_if_stopped(trainer: MRPOTrainer) -> Iterator[None]:
    """report.html with what there is, whatever ends the run."""
    try:
        yield
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if trainer.is_world_process_zero():
            _report(trainer, card_of(trainer), f"stopped after step {trainer.state.global_step}: {reason}")
        raise


class LiveReport(TrainerCallback):
    """report.html anew after every evaluation, which takes longer than writing it."""

    def __init__(self, trainer: MRPOTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            status = f"running, step {state.global_step} of {state.max_steps}"
            _report(self.trainer, card_of(self.trainer), status)


def _report(trainer: MRPOTrainer, card: ModelCard, status: str) -> None:
    folder = trainer.args.folder
    command = command_digest(trainer.script, trainer.args)
    facts = {"name": run_name(trainer), "status": status, "command": command, **card.facts()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    write_report([Run(folder.name, facts, trainer.state.log_history)], folder / "report.html")


def card_of(trainer: MRPOTrainer, metadata: Mapping[str, Any] | None = None) -> ModelCard:
    """Everything that is known of the run so far.

    Args:
        metadata: of the front matter: license, language, tags; and ``dataset``, a name for rows that came from Python.
    """
    args, plan, script = trainer.args, trainer.plan, trainer.script
    metadata = dict(metadata or {})
    dataset = metadata.pop("dataset", None) or ([spec.name for spec in script.datasets] if script else "")
    packages = ("mrpo-scale", "torch", "transformers", "accelerate", "deepspeed", "datasets")
    stores = zip(plan.names, trainer.scores.stores, strict=True) if trainer.scores.stores else ()
    return ModelCard(
        base_model=str(script.model_name_or_path if script else trainer.policy.name_or_path),
        dataset=dataset,
        settings={
            "objective": args.objective,
            "beta": args.beta,
            "epsilon_max": args.epsilon_max,
            "clip": args.clip,
            "ref_weights": _weights(trainer),
            "aggregate": args.aggregate,
            "loss_type": " ".join(args.loss_type),
            "label_smoothing": args.label_smoothing,
            "learning_rate": args.learning_rate,
            "pairs per optimizer step": trainer.window_size,
            "optimizer steps": trainer.state.global_step,
            **({"weights of step": best} if (best := trainer.measured_best()) else {}),
            "max_length": args.max_length,
        },
        references=[(r.name, r.source.path, r.source.revision) for r in plan.references],
        reference_keys={name: store.identity.key for name, store in stores},
        data={split: {"pairs": len(pairs), **pairs.counts} for split, pairs in trainer.pair_sets.items()},
        results=trainer.results,
        versions={name: importlib.metadata.version(name) for name in packages},
        curves="curves.png",
        recipe=recipe_of(trainer.script, trainer.args),
        rows=trainer.comparison,
        metadata=metadata,
    )


def _weights(trainer: MRPOTrainer) -> str:
    """As the recipe says, and the numbers that `validation` found."""
    word, found = " ".join(map(str, trainer.args.ref_weights)), trainer.preference_objective.ref_weights
    if trainer.args.weights_from_validation and not isinstance(found, str):
        return f"{word}: {' '.join(f'{weight:.3f}' for weight in found)}"
    return word


def recipe_of(script: ScriptArguments | None, args: MRPOConfig) -> dict[str, Any]:
    """The keys of a run that are not defaults, without those that say where."""
    keys = {**(non_default_keys(script) if script else {}), **args.non_default_keys}
    if keys.get("ref_models"):
        keys["ref_models"] = [_as_typed(entry) for entry in keys["ref_models"]]
    return {key: value for key, value in keys.items() if key not in _PLACES}


def command_digest(script: ScriptArguments | None, args: MRPOConfig) -> str:
    """Tells one recipe from another, local paths included, which the report does not show."""
    return hashlib.sha256(json.dumps(recipe_of(script, args), sort_keys=True, default=str).encode()).hexdigest()


def finished_run(script: ScriptArguments, args: MRPOConfig) -> tuple[list[RunSummary], list[dict[str, Any]]] | None:
    """The comparison's rows and the log of the run that these arguments have already made in ``output_dir``; None if it is not
    through, or is of other arguments."""
    try:
        state = json.loads((args.folder / "trainer_state.json").read_text())
        facts = json.loads((args.folder / RUN_FACTS).read_text())
    except (OSError, ValueError):
        return None
    through = state["global_step"] >= state["max_steps"] and facts.get("command") == command_digest(script, args)
    return ([RunSummary(**row) for row in facts["rows"]], state["log_history"]) if through else None


def _as_typed(entry: str) -> str | dict[str, Any]:
    """A reference as a recipe writes it; the command line carries mappings as JSON."""
    return non_default_keys(parse_ref_models([entry])[0]) if entry.lstrip().startswith("{") else entry
