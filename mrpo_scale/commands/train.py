"""One recipe from start to end: the baselines it names, its own objective, the table, the model folder, the report."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from mrpo_scale.base.device import peak_memory_gib, reset_peak_memory
from mrpo_scale.base.errors import Preempted
from mrpo_scale.base.heartbeat import heartbeat, set_activity
from mrpo_scale.base.ranks import all_gather_object, barrier, broadcast_from_rank0, world_group
from mrpo_scale.config.digest import command_digest
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.recipe import parse
from mrpo_scale.data.inputs import read_rows
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.lifecycle.checkpoints import find_complete
from mrpo_scale.lifecycle.output_folder import check_output_folder
from mrpo_scale.lifecycle.preemption import PREEMPTED, already_told
from mrpo_scale.lifecycle.template_date import decide_date
from mrpo_scale.reports.artifacts import finished_run
from mrpo_scale.reports.html_report import read_run, write_report
from mrpo_scale.reports.pictures import RunSummary, comparison_table, plot_comparison
from mrpo_scale.reports.run_facts import run_name
from mrpo_scale.training.preflight import preflight
from mrpo_scale.training.prepare import check_reward
from mrpo_scale.training.run_report import LiveReport, report_if_stopped
from mrpo_scale.training.trainer import MRPOTrainer

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> list[RunSummary]:
    """Train what the command line asks for and print the comparison; returns the table's rows (on every rank).

    Each baseline is the same recipe with another ``objective``, in ``<output_dir>/<objective>``.

    A run that goes on takes what is finished as it is: baselines, or all of it.

    Raises:
        ConfigError, TrainingError: see errors.py.
        Preempted: see preemption.py.
    """
    script, config = parse(argv)
    # Before the data is read, and before the baselines, which take as long as the run.
    preflight(config, script.ref_models)
    check_output_folder(config, script.model_name_or_path, script.ref_models)
    with heartbeat(config.heartbeat_timeout):
        if broadcast_from_rank0(already_told(config.folder), world_group()):
            raise Preempted(f"{config.folder / PREEMPTED}: this job was told to stop, so its ranks do not start again")
        return _train_all(argv, script, config)


def _train_all(argv: Sequence[str], script: ScriptArguments, config: MRPOConfig) -> list[RunSummary]:
    rows: list[RunSummary] = []
    histories: dict[str, list[dict[str, Any]]] = {}
    # One date for all: they read the same text, on whatever day each of them begins.
    date = decide_date(config, [config.folder / baseline for baseline in script.baselines]).isoformat()
    if script.baselines:  # which need none, and would train before it is found missing
        check_reward(config)
    for baseline in script.baselines:
        folder = str(config.folder / baseline)
        baseline_script, baseline_config = parse([*argv, "--objective", baseline, "--output_dir", folder])
        baseline_config.template_date = date
        trained = _train(baseline_script, baseline_config, rows, config.folder)
        _keep(trained, rows, histories)
    if script.baselines:
        script, config = parse(argv)  # a fresh DeepSpeed configuration for the second engine of this process
        config.template_date = date
    _keep(_train(script, config, rows, config.folder), rows, histories)
    if config.process_index == 0:
        print(f"\n{comparison_table(rows)}\n", flush=True)
        if len(histories) > 1:
            plot_comparison(histories, config.folder / "comparison.png")
            folders = [config.folder / baseline for baseline in script.baselines]
            write_report([read_run(folder) for folder in (*folders, config.folder)], config.folder / "comparison.html")
        print(f"model and model card: {config.output_dir}; to look at: {config.folder / 'report.html'}", flush=True)
    return rows


def _keep(trained: tuple[list[RunSummary], list[dict[str, Any]]], rows: list[RunSummary], histories: dict) -> None:
    summaries, history = trained
    rows += [row for row in summaries if row.name not in {known.name for known in rows}]
    histories[summaries[-1].name] = history


def _train(
    script: ScriptArguments, config: MRPOConfig, others: Sequence[RunSummary], main: Path
) -> tuple[list[RunSummary], list[dict[str, Any]]]:
    """One objective: train, evaluate, save. Returns the rows `base` and its own, and the log.

    Args:
        others: rows of the runs before this one, for the table on its card.
        main: the ``output_dir`` of the command line, where STOP is looked for.
    """
    finished = _finished(script, config, main)
    if finished is not None:
        return finished
    set_activity("reading the data")
    train_rows, eval_rows = read_rows(script, config)
    config.anchor = resolve(config.anchor) if config.anchor else None
    reset_peak_memory()
    trainer = MRPOTrainer(
        resolve(str(script.model_name_or_path)),
        ref_models=[resolve(ref) for ref in script.ref_models],
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        script=script,
        stop_folder=main,
    )
    trainer.add_callback(LiveReport(trainer.facts))
    _announce(trainer)
    with report_if_stopped(trainer.facts, write=trainer.is_world_process_zero()):
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        if eval_rows is not None and not _measured(trainer):
            trainer.evaluate()
        summaries = _summaries(trainer)
        known = {row.name for row in others}
        trainer.compare_with([*others, *(row for row in summaries if row.name not in known)])
        save_final(trainer)
    history = _log(trainer)
    release(trainer)
    return summaries, history


def _finished(
    script: ScriptArguments, config: MRPOConfig, main: Path
) -> tuple[list[RunSummary], list[dict[str, Any]]] | None:
    """What this run, or the one that it is part of, left when it ended in a previous attempt, and a line that says so.

    Without checkpoints (`save_strategy: no`) there is nothing to go on from, and a run that is started again is trained again.
    """
    found = None
    if config.process_index == 0 and str(config.resume_from_checkpoint).lower() in ("auto", "true"):
        found = finished_run(config.folder, command_digest(script, config))
        if found is not None and not any(find_complete(folder)[0] for folder in {config.folder, main}):
            logger.warning(
                "%s holds a finished run without checkpoints: it is trained again and replaced", config.folder
            )
            found = None
    found = broadcast_from_rank0(found, world_group())
    if found is not None:
        logger.info(
            "%s: this run is finished, nothing is trained. For another one name another `output_dir`, or set "
            "`resume_from_checkpoint: never`.",
            config.folder,
        )
    return found


def _announce(trainer: MRPOTrainer) -> None:
    args = trainer.args
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else None
    sharding = f"DeepSpeed ZeRO stage {stage}" if stage is not None else "no DeepSpeed"
    logger.info(
        "%s: world size %d, %s, %s; K=%d references: %s",
        args.objective, args.world_size, sharding, args.device, len(trainer.plan.names), ", ".join(trainer.plan.names),
    )  # fmt: skip
    way = "made in the forward" if args.gradients_in_forward else "recomputed in the backward"
    logger.info("gradients of the output head are %s (head_backward: %s)", way, args.head_backward)
    logger.info("%d pairs, %d per optimizer step", len(trainer.pair_sets["train"]), trainer.window_size)


def _measured(trainer: MRPOTrainer) -> bool:
    """Whether the held-out set was measured on the weights that are saved."""
    step = trainer.state.global_step
    return trainer.measured_best() is not None or any("eval_loss" in e and e["step"] == step for e in _log(trainer))


def _log(trainer: MRPOTrainer) -> list[dict[str, Any]]:
    return trainer.state.log_history


def _summaries(trainer: MRPOTrainer) -> list[RunSummary]:
    """Rows of the table: the untrained policy where it was evaluated, and this run."""
    everyone = all_gather_object(peak_memory_gib(trainer.args.device), world_group())
    evals = [entry for entry in _log(trainer) if "eval_loss" in entry]
    rows = []
    if len(evals) > 1 and evals[0]["step"] == 0:
        rows.append(RunSummary("base", evals[0]["eval_logps/accuracies"], None, None, None, None))
    last = trainer.results
    rows.append(
        RunSummary(
            name=run_name(trainer.args.objective, len(trainer.plan.names)),
            ranking_accuracy=last.get("eval_logps/accuracies"),
            reward_accuracy=last.get("eval_rewards/accuracies"),
            reward_margin=last.get("eval_rewards/margins"),
            seconds_per_step=trainer.clock.median(),
            peak_memory_gib_per_rank=everyone,
        )
    )
    return rows


def save_final(trainer: MRPOTrainer) -> None:
    """The trained model as an ordinary Hugging Face folder, its card, curves and report, in ``output_dir``. Collective."""
    trainer.save_model()
    if not trainer.args.push_to_hub:  # a push has written them
        trainer.create_model_card()


def release(trainer: MRPOTrainer) -> None:
    """Let go of a finished run's engine and shards, so that the next one in this process starts clean. Collective."""
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    trainer.scores.references.clear()
    trainer.accelerator.free_memory()
    # The process group lives on in PartialState; the run's precision and DeepSpeed plugin do not.
    AcceleratorState._reset_state()
    gc.collect()
    barrier()
