"""Benchmark tasks through lm-evaluation-harness, which is an optional extra of this package."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.base.tables import aligned_table
from mrpo_scale.eval.config import EvalConfig
from mrpo_scale.eval.models import EvalModel


def find_tasks(args: EvalConfig) -> Any:
    """The harness's task manager, once it is known to have every task of ``args``; reads no data.

    Raises:
        ConfigError: the extra is not installed, or it has no such task.
    """
    try:
        tasks = importlib.import_module("lm_eval.tasks")
        importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ConfigError(
            f"`tasks` needs lm-evaluation-harness, which cannot be imported ({error}): pip install 'mrpo-scale[eval]'."
        ) from error
    manager = tasks.TaskManager(include_path=args.include_path)
    unknown = [name for name in args.tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"`tasks: {','.join(args.tasks)}`: lm-evaluation-harness has no task `{unknown[0]}`; `lm-eval ls tasks` lists "
            "them, and `include_path` adds a folder with task files of your own."
        )
    return manager


def run_tasks(model: EvalModel, manager: Any, args: EvalConfig, device: torch.device) -> dict[str, Any] | None:
    """{task: {metric: value}} as the harness reports it; None on ranks that it gives nothing to.

    The harness splits documents over the ranks of GPUs by itself; on CPUs it does not, and rank 0 alone works (the caller's part).
    """
    lm_eval = importlib.import_module("lm_eval")
    huggingface = importlib.import_module("lm_eval.models.huggingface")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    tokenizer = model.tokenizer
    if args.apply_chat_template and model.text.template is not None:
        tokenizer.chat_template = model.text.template
    harness_model = huggingface.HFLM(
        pretrained=model.source.path,
        revision=model.source.revision or "main",
        tokenizer=tokenizer,
        device=str(device),
        dtype=model.source.dtype,
        batch_size=args.task_batch_size,
        trust_remote_code=model.source.trust_remote_code,
        **({"attn_implementation": model.source.attn_implementation} if model.source.attn_implementation else {}),
    )
    try:
        results = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=args.tasks,
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            limit=args.task_limit,
            apply_chat_template=args.apply_chat_template,
            log_samples=False,
        )
    except (OSError, ValueError) as error:
        # Mostly a task whose data set cannot be had: the harness and `datasets` say which.
        raise ConfigError(
            f"`tasks: {','.join(args.tasks)}` failed in lm-evaluation-harness: {one_line(error)}"
        ) from error
    return None if results is None else _plain(results)


def _plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers only: the harness mixes in display names."""
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for task, metrics in results["results"].items()
    }


def tasks_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per task and metric, one column per model."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for model, tasks in results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                name, _, which = metric.partition(",")
                if name.endswith("_stderr") or name in ("alias", "sample_len"):
                    continue
                error = metrics.get(f"{name}_stderr,{which}" if which else f"{name}_stderr")
                text = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
                lines.setdefault((task, metric), {})[model] = text
    rows = [(f"{task} {metric}", *(cells.get(m, "-") for m in results)) for (task, metric), cells in lines.items()]
    return aligned_table(("task", *results), rows)
