"""`mrpo eval` from its words to its tables: preference accuracy, win rate, tasks, whichever the keys ask for."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState

from mrpo_scale.base.heartbeat import heartbeat
from mrpo_scale.base.untrusted import refuse_links
from mrpo_scale.config.checks import check_world_size
from mrpo_scale.config.data_keys import parse_columns
from mrpo_scale.config.recipe import parse_keys
from mrpo_scale.data import find_layout, load_rows
from mrpo_scale.data.messages import as_text, said
from mrpo_scale.data.pair_dataset import PairDataset, check_prompts, check_token_ids, prepare_pairs
from mrpo_scale.data.pairs import PreferencePair, Response
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.eval.config import EvalConfig
from mrpo_scale.eval.generation import first_prompts, generate_responses
from mrpo_scale.eval.judge import Judge
from mrpo_scale.eval.models import EvalModel, plan_models
from mrpo_scale.eval.preference import PairScores, as_json, preference_table, score_model, summarize
from mrpo_scale.eval.records import RecordFile
from mrpo_scale.eval.tasks import find_tasks, run_tasks, tasks_table
from mrpo_scale.eval.verdicts import Verdicts, confirm, estimate
from mrpo_scale.eval.win_rate import Comparison, WinRate, win_rate, win_rate_table
from mrpo_scale.lifecycle.template_date import write_record
from mrpo_scale.references.placement import shard_group

logger = logging.getLogger(__name__)

# Rank 0 may wait for the judge, or work on tasks, for hours; a rank that dies is noticed by its heartbeat, not by this.
PATIENCE = timedelta(days=2)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Evaluate what the command line asks for, print the tables and return the results (the win rate on rank 0 only).

    Raises:
        ConfigError: see errors.py.
    """
    args = parse_keys(EvalConfig, argv, "mrpo eval")
    refuse_links(Path(args.output_dir), "output_dir")
    judge = _judge(args) if args.judge_model else None
    state = _join_processes()
    with heartbeat():
        return _evaluate(args, judge, state)


def _evaluate(args: EvalConfig, judge: Judge | None, state: PartialState) -> dict[str, Any]:
    models, reference, texts = plan_models(args, state.device)
    dated = sorted({text.name for text in texts if text.prints_date})
    if dated and state.is_main_process:
        logger.info("the chat templates of %s print the date: it is %s (`template_date`)", dated, args.template_date)
        write_record(Path(args.output_dir), str(args.template_date), replace=True)
    manager = find_tasks(args) if args.tasks else None
    report = _Report(args, [model.name for model in models], state.is_main_process)
    if args.dataset_name:
        with state.local_main_process_first():
            pairs = _read_pairs(args, texts, write=state.is_main_process)
        readers = [model.reader for model in (*models, reference) if model is not None]
        check_token_ids(pairs, texts, readers, "eval")
        check_prompts(pairs, args.repeated_prompt, args.max_bad_rows, "eval")
        said = [remark.sentence for remark in pairs.remarks]
        counts = {"pairs": len(pairs), "skipped": pairs.counts, "remarks": said}
        report.add("data", {"dataset_name": args.dataset_name, **counts})
        if args.max_pairs != 0:
            _preference(models, reference, pairs, args, state, report)
        if judge is not None:
            _win_rates(models, pairs, judge, args, state, report)
    if args.tasks:
        _tasks(models, manager, args, state, report)
    return report.results


def _join_processes() -> PartialState:
    # An accelerate config made for training may ask for DeepSpeed, which would partition whatever model is loaded: no engine here.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=use_cpu or not torch.cuda.is_available(), timeout=PATIENCE)
    check_world_size(state.num_processes)
    return state


class _Report:
    """The results so far: printed and written as they come, so that a later part that fails loses none."""

    def __init__(self, args: EvalConfig, models: list[str], is_main: bool) -> None:
        self.results: dict[str, Any] = {"models": models}
        self._output, self._is_main = args.output, is_main

    def add(self, part: str, values: dict[str, Any], table: Callable[[], str] | None = None) -> None:
        self.results[part] = values
        if self._is_main:
            if table is not None:
                print(f"\n{table()}\n", flush=True)
            if self._output is not None:
                path = Path(self._output)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(self.results, indent=2) + "\n")


def _judge(args: EvalConfig) -> Judge:
    return Judge(
        url=str(args.judge_url),
        model=str(args.judge_model),
        options=args.request_options(),
        api_key=args.api_key(),
        retries=args.judge_retries,
        timeout=args.judge_timeout,
    )


def _read_pairs(args: EvalConfig, texts: list[ModelText], *, write: bool) -> PairDataset:
    train, test = load_rows(
        resolve(str(args.dataset_name)),
        config=args.dataset_config,
        columns=parse_columns(args.columns),
        train_split=args.dataset_train_split,
        test_split=args.dataset_test_split,
        held_out=args.held_out,
        seed=args.seed,
    )
    if test is None and write:
        logger.info("%s has no test split: split %s is scored", args.dataset_name, args.dataset_train_split)
    rows = train if test is None else test
    return prepare_pairs(
        rows,
        find_layout(rows, args.dataset_layout),
        texts,
        max_length=args.max_length,
        options=args.pair_options,
        on_bad_row=args.on_bad_row,
        max_bad_rows=args.max_bad_rows,
        bad_rows_file=Path(args.output_dir) / "bad_rows_eval.jsonl",
        split="eval",
        num_proc=args.dataset_num_proc,
        write=write,
    )


def _preference(
    models: list[EvalModel],
    reference: EvalModel | None,
    pairs: PairDataset,
    args: EvalConfig,
    state: PartialState,
    report: _Report,
) -> None:
    group = shard_group(args.shard_size, timeout=PATIENCE)
    count = len(pairs) if args.max_pairs is None else min(args.max_pairs, len(pairs))

    def score(model: EvalModel) -> PairScores:
        scores = score_model(model, pairs, count, args, state.device, group)
        _free()
        return scores

    against = None if reference is None else score(reference)
    results = {model.name: summarize(score(model), against, args.beta) for model in models}
    report.add("preference", as_json(results), lambda: preference_table(results, pairs.counts))


def _win_rates(
    models: list[EvalModel], pairs: PairDataset, judge: Judge, args: EvalConfig, state: PartialState, report: _Report
) -> None:
    """The first model against each of the others; one alone against the chosen responses of the data set."""
    prompts = first_prompts(pairs, args.max_prompts)
    responses = {}
    for model in models:
        responses[model.name] = generate_responses(model, prompts, args, state.device)
        _free()
    if not state.is_main_process:
        return
    ours, *others = responses
    if not others:
        others = ["chosen"]
        responses["chosen"] = [_first_turn(prompt.chosen) for prompt in prompts]
    shown = [_as_text(prompt) for prompt in prompts]
    matches = {
        f"{ours} against {other}": [
            Comparison(*texts) for texts in zip(shown, responses[ours], responses[other], strict=True)
        ]
        for other in others
    }
    results = _judge_all(matches, judge, args)
    values = {name: asdict(result) for name, result in results.items()}
    report.add("win_rate", {"judge": judge.model, **values}, lambda: win_rate_table(results))


def _judge_all(matches: dict[str, list[Comparison]], judge: Judge, args: EvalConfig) -> dict[str, WinRate]:
    calls = [call for match in matches.values() for c in match if not c.identical for call in c.calls]
    with RecordFile(Path(args.output_dir) / "verdicts.jsonl", ("key", "verdict")) as file:
        verdicts = Verdicts(judge, file)
        confirm(estimate(verdicts, calls, args.judge_price), judge, args.yes)
        verdicts.collect(calls, args.judge_concurrency)
        return {name: win_rate(match, verdicts) for name, match in matches.items()}


def _as_text(pair: PreferencePair) -> str:
    """A prompt for the judge's eyes."""
    return pair.prompt if isinstance(pair.prompt, str) else as_text(pair.prompt)


def _first_turn(response: Response) -> str:
    """What a model's response is compared with: it answers with one turn."""
    return response if isinstance(response, str) else said(response[0])


def _tasks(models: list[EvalModel], manager: Any, args: EvalConfig, state: PartialState, report: _Report) -> None:
    if state.device.type == "cpu" and not state.is_main_process:
        return  # the harness splits documents over GPUs only
    results: dict[str, Any] = {}
    for model in models:
        found = run_tasks(model, manager, args, state.device)
        if found is not None:
            results[model.name] = found
        _free()
    if results:
        report.add("tasks", results, lambda: tasks_table(results))


def _free() -> None:
    """One model at a time: let go of the last one's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
