"""`mrpo check`: the dry run before money is spent. Configs, tokenizers, data and the headers of weights that are here are read."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.gpus import GIB
from mrpo_scale.config.elsewhere import ConfigElsewhere
from mrpo_scale.config.hardware import Hardware, bf16_instructions, missing_hardware
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.recipe import parse
from mrpo_scale.data import find_layout
from mrpo_scale.data.inputs import TRAIN_SET, check_steps, evaluation_sets, prepare_sets, read_rows
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.lifecycle.output_folder import check_output_folder
from mrpo_scale.lifecycle.template_date import decide_date
from mrpo_scale.models.adapter_files import read_adapter
from mrpo_scale.models.plan import RunPlan, plan_models
from mrpo_scale.models.same_weights import repeated_references
from mrpo_scale.models.source import check_weight_files
from mrpo_scale.models.tensor_check import check_model
from mrpo_scale.planner.cluster import Cluster, make_cluster
from mrpo_scale.planner.data import (
    ReadSet,
    lengths_table,
    plot_lengths,
    reader_names,
    remarks_list,
    render_pairs,
    sets_table,
    tokens_cut,
)
from mrpo_scale.planner.estimate import Estimate, estimate
from mrpo_scale.planner.job import Job, PlannedModel, Setting
from mrpo_scale.planner.model_size import assumed_fields, model_size
from mrpo_scale.planner.search import TRIED, Found, search, smallest_that_fits
from mrpo_scale.planner.show import (
    as_json,
    assumptions,
    memory_table,
    models_table,
    plans_list,
    plot_memory,
    setting_in_words,
    time_table,
)
from mrpo_scale.planner.workload import Workload
from mrpo_scale.planner.zero import Zero, read_zero
from mrpo_scale.references.adapters import lenders, loaded_apart
from mrpo_scale.references.reward import plan_reward
from mrpo_scale.training.preflight import check_best_metric, check_evaluation, preflight_problems
from mrpo_scale.training.sequences import check_sequences

HELP = """usage: mrpo check --config RECIPE [--key value ...] [--gpus N] [--gpu NAME] [--gpus_per_node N] [--network RATE]
                  [--ds_config NAME] [--output FOLDER]

What a run will read, hold, compute and send, from configs, tokenizers and data alone; no weights are loaded or needed (of those
that are here, it is checked that no tensor is missing).
Ends with exit code 2 where the run would not start, and says all the reasons that can be known beforehand.

  --gpus           devices of the run, 8 unless given
  --gpu            their kind, h100-80gb unless given; an unknown name lists the known ones
  --gpus_per_node  8, or all where there are fewer
  --network        of each device, such as 400gbit (the default), or of a node: 3200gbit/node
  --ds_config      file, or name of one of the package; default: the recipe's `deepspeed`, else zero3 on one node, zero3_hpz on
                   several, none on one device, zero3_cpu for --gpu cpu
  --output         folder of check.json, pairs.txt, lengths.png and memory.png; default: OUTPUT_DIR/check
"""


def check(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 2 where the run would not start.

    Raises:
        ConfigError: a command line or recipe that cannot be read, or machines that make no cluster.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    flags, rest = _flags().parse_known_args(list(argv))
    cluster = make_cluster(flags.gpu, flags.gpus, flags.gpus_per_node, flags.network)
    script, config = parse(rest, ConfigElsewhere)
    if config.process_index != 0:
        return 0
    zero = read_zero(flags.ds_config or _default_zero(config, cluster), cluster)
    checked = _Check(script, config, cluster, zero, flags.output or config.folder / "check")
    checked.run()
    return 2 if checked.errors else 0


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrpo check", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--gpus_per_node", type=int)
    parser.add_argument("--network")
    parser.add_argument("--ds_config")
    parser.add_argument("--output", type=Path)
    return parser


def _default_zero(config: MRPOConfig, cluster: Cluster) -> str:
    """As launch/accelerate's files do, unless the recipe names one."""
    if config.deepspeed:
        return config.deepspeed if isinstance(config.deepspeed, str) else json.dumps(config.deepspeed)
    if cluster.name == "cpu":
        return "zero3_cpu"
    if cluster.gpus == 1:
        return "none"
    return "zero3" if cluster.num_nodes == 1 else "zero3_hpz"


#: Files in the folder of a check.
_WRITTEN = ("check.json", "pairs.txt", "lengths.png", "memory.png", "bad_rows_*.jsonl")


class _Check:
    """One run of the command: what was found, and what would stop the run."""

    def __init__(self, script: ScriptArguments, config: MRPOConfig, cluster: Cluster, zero: Zero, folder: Path) -> None:
        self.script, self.config, self.cluster, self.zero, self.folder = script, config, cluster, zero, folder
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.found: dict[str, Any] = {}
        # What this machine is says nothing of the one that trains.
        self.gpu = cluster.name != "cpu"
        half = config.fp16 or config.non_default_keys.get("bf16", self.gpu)
        if half == "auto":
            half = self.gpu or bf16_instructions() is not None
        config.bf16 = bool(half and not config.fp16)

    def run(self) -> None:
        for name in _WRITTEN:  # of an earlier check
            for old in self.folder.glob(name):
                old.unlink()
        rows = sets = plan = None
        gpu = self.gpu and not self.config.use_cpu
        # A cluster of CPUs is taken to be of this machine's.
        machine = Hardware(gpu, bf16=gpu or (not self.gpu and bf16_instructions() is not None), tf32=gpu)
        self.errors += missing_hardware(self.config, self.config.head_impl, machine)
        decide_date(self.config)  # as the run would, in its own folder
        with self._collected():
            self.errors += preflight_problems(self.config, self.script.ref_models)
            check_output_folder(self.config, self.script.model_name_or_path, self.script.ref_models)
        self.config.output_dir = str(self.folder)  # bad_rows_*.jsonl
        with self._collected():
            rows = read_rows(self.script, self.config)
        if rows is not None:
            with self._collected():
                check_evaluation(self.config, rows[1])
        with self._collected():
            plan = self._plan()
        if plan is not None:
            with self._collected():
                names = plan.names[:1] if self.config.objective == "dpo" else plan.names
                check_best_metric(self.config, names, ())
            with self._collected():
                check_sequences(plan, self.config, self.cluster.gpus, torch.device("cuda" if self.gpu else "cpu"))
        self._look_at_sampling()
        if plan is not None:
            self._look_for_weights(plan)
            if plan.dated:
                self.warnings.append(
                    f"the chat templates of {', '.join(plan.dated)} print the date; in all of this run it would be "
                    f"{self.config.template_date} (`template_date`)"
                )
        if plan is not None and rows is not None:
            sets = self._read(plan, *rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        if plan is not None and sets:
            self._show_data(plan, sets)
            with self._collected():
                self._show_cost(plan, next((s for s in sets if s.split == "train"), sets[0]))
        self.found |= {"errors": self.errors, "warnings": self.warnings}
        (self.folder / "check.json").write_text(json.dumps(self.found, indent=2, ensure_ascii=False) + "\n")
        for warning in self.warnings:
            print(f"note: {warning}")
        for error in self.errors:
            print(f"error: {error}")
        files = ", ".join(sorted(path.name for path in self.folder.iterdir()))
        print(f"{'The run would not start. ' if self.errors else ''}{self.folder}: {files}")

    def _look_at_sampling(self) -> None:
        """What `kd` and `rlhf` need beside the rest, and that none of it is in the estimate."""
        if not self.config.samples:
            return
        if self.config.objective == "rlhf" and self.config.reward_model:
            with self._collected():
                plan_reward(self.config.reward_model, device=self.config.device)
        self.warnings.append(
            f"`objective: {self.config.objective}`: time and memory are those of training on the labelled pairs; sampling, scoring "
            "and training on samples are not in them (docs/baselines.md)"
        )

    @contextmanager
    def _collected(self) -> Iterator[None]:
        """Errors of the run are findings here: the check goes on to find the others."""
        try:
            yield
        except ConfigError as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))

    def _plan(self) -> RunPlan | None:
        """All models; where one is wrong, the others are still looked at."""
        if not self.script.model_name_or_path:
            return None  # read_rows has said so
        self.config.anchor = resolve(self.config.anchor) if self.config.anchor else None
        policy = resolve(str(self.script.model_name_or_path))
        references = [resolve(reference) for reference in self.script.ref_models]
        try:
            return plan_models(policy, references, self.config, None, weights_needed=False)
        except ConfigError as error:
            self.errors.append(str(error))
        each = copy.copy(self.config)
        each.ref_weights = ["uniform"]  # a list of weights is for all of them
        for reference in references:
            with self._collected():
                plan_models(policy, [reference], each, None, weights_needed=False)
        return None

    def _look_for_weights(self, plan: RunPlan) -> None:
        self.warnings += repeated_references(plan, self.config)
        self.warnings += loaded_apart(
            {k: r.source for k, r in enumerate(plan.references) if not (k == 0 and self.config.anchor_is_policy)}
        )
        self.warnings += [
            f"{r.name} is served at {r.source.server.url}: nothing was asked of that server, and scoring there is in no figure"
            for r in plan.references
            if r.source.server is not None
        ]
        sources = [plan.policy, *(r.source for r in plan.references if r.source.server is None)]
        for source in {(source.path, source.revision): source for source in reversed(sources)}.values():
            try:
                check_weight_files(source)
            except ConfigError as error:
                self.warnings.append(f"the weights are not here: {error}")
            else:
                with self._collected():
                    check_model(source)
            if assumed := assumed_fields(source):
                self.warnings.append(
                    f"{source.name}: config.json leaves out {', '.join(assumed)}; these are transformers' defaults"
                )

    def _read(self, plan: RunPlan, train: Any, evals: Any) -> list[ReadSet]:
        rows = {TRAIN_SET: train, **evaluation_sets(evals)}
        pairs: dict[str, PairDataset] = {}
        findings: list[ConfigError] = []
        with self._collected():
            pairs = prepare_sets(plan, self.config, train, evals, findings)
        self.errors += [str(error) for error in findings if str(error) not in self.errors]
        return [
            ReadSet(split, find_layout(rows[split], self.config.dataset_layout).name, len(rows[split]), found)
            for split, found in pairs.items()
            if rows.get(split) is not None and len(found)
        ]

    def _show_data(self, plan: RunPlan, sets: list[ReadSet]) -> None:
        names, first = reader_names(plan), sets[0]
        print(f"\nDATA\n\n{sets_table(sets, plan.texts[0])}")
        if said := remarks_list(sets):
            print(f"\n{said}")
        print(f"\n{lengths_table(first.pairs.lengths, first.pairs.scored, names)}")
        print(f"\n{render_pairs(first.pairs, plan.texts, names, width=160)}\n")
        plot_lengths(first.pairs.lengths, names, self.config.max_length, self.folder / "lengths.png")
        whole = render_pairs(first.pairs, plan.texts, names, width=None)
        (self.folder / "pairs.txt").write_text(whole + "\n", encoding="utf-8")
        self.found["data"] = {
            read.split: {**read.summary, "tokens_lost": tokens_cut(read.pairs, plan.texts[0])} for read in sets
        }

    def _show_cost(self, plan: RunPlan, read: ReadSet) -> None:
        job, setting = self._job(plan, read), self._setting()
        if read.split == TRAIN_SET:
            with self._collected():
                check_steps(self.config, len(read.pairs), job.window)
        cluster = self.cluster
        print(f"COST on {cluster.gpus} x {cluster.name}, {cluster.per_node} a node", end="")
        print(f", {cluster.network * 8 / 1e9:.0f} Gbit/s of network each" if cluster.num_nodes > 1 else "")
        print(f"\n{models_table(job)}\n\n{job.window} pairs per optimizer step; ", end="")
        print(f"{setting_in_words(setting, self._accumulation())}\n")
        live = estimate(job, replace(setting, live=True, only_anchor=True), cluster)
        estimates = {"DPO, live": live}
        if len(job.references) > 1:
            live = estimate(job, replace(setting, live=True), cluster)
            estimates[f"K={len(job.references)}, live"] = live
        other = replace(setting, live=True, checkpointing=not setting.checkpointing)
        way = "with" if other.checkpointing else "without"
        estimates[f"{way} checkpointing"] = estimate(job, other, cluster)
        cached = estimate(job, replace(setting, live=False), cluster)
        estimates["cached"] = cached
        print(f"{memory_table(estimates)}\n\n{time_table(estimates)}\n")
        plot_memory(estimates, self.folder / "memory.png")
        most = setting.max_tokens
        searches = {"live": search(job, cluster, most), "cached": search(job, cluster, most, live=False)}
        self._say_cheapest(job, live if setting.live else cached, searches)
        print(f"\n{assumptions(cluster)}\n")
        self.found["cost"] = {
            "gpu": cluster.name,
            "gpus": cluster.gpus,
            "estimates": {name: as_json(found) for name, found in estimates.items()},
            "cheapest": {
                name: {
                    "tried": s.tried,
                    "fit": s.fitting,
                    "setting": None if s.best is None else as_json(s.best),
                    "next": [as_json(plan) for plan in s.plans[1:]],
                }
                for name, s in searches.items()
            },
        }

    def _say_cheapest(self, job: Job, own: Estimate, searches: dict[str, Found]) -> None:
        if own.peak > own.cluster.usable:
            self.warnings.append(
                f"this recipe needs {own.peak / GIB:.1f} GiB at {own.moment}, more than the {own.cluster.usable / GIB:.1f} of a "
                f"{own.cluster.name} that one can count on: it will run out of memory"
            )
        for name, found in searches.items():
            print(f"cheapest with references {name}, {found.fitting} of {found.tried} settings fit: ", end="")
            if found.best is not None:
                print(plans_list(found.plans))
            else:
                host = sum(found.least.host.values()) / GIB
                print(
                    f"none; the smallest needs {found.least.peak / GIB:.1f} GiB and {host:.1f} GiB of host memory: ",
                    end="",
                )
                print(setting_in_words(found.least.setting, found.least.accumulation))
        if (
            searches["live"].best is None
            and (larger := smallest_that_fits(job, self.cluster, own.setting.max_tokens)) is not None
        ):
            grown, found = larger
            assert found.best is not None
            print(
                f"with live references it fits on {grown.gpus}: {setting_in_words(found.best.setting, found.best.accumulation)}"
            )
        print(f"tried: {TRIED}")

    def _job(self, plan: RunPlan, read: ReadSet) -> Job:
        half, config = self.config.bf16 or self.config.fp16, self.config
        device_type: Literal["cuda", "cpu"] = "cpu" if self.cluster.name == "cpu" else "cuda"
        options: Any = {"shared_prompt": config.shared_prompt, "device_type": device_type}
        references = plan.references[:1] if config.objective == "dpo" else plan.references
        here = [reference for reference in references if reference.source.server is None]
        loaded = {k: r.source for k, r in enumerate(here) if not (k == 0 and config.anchor_is_policy)}
        lender = lenders(loaded)
        return Job(
            policy=model_size(
                plan.policy,
                itemsize=2 if half else plan.policy.dtype.itemsize,
                compiled=bool(config.torch_compile),
                adapter=config if config.use_peft else None,
                **options,
            ),
            references=tuple(
                PlannedModel(
                    model_size(r.source, itemsize=r.source.dtype.itemsize, **options),
                    r.tokenization,
                    is_policy=k not in loaded,
                    shares_with=None if lender.get(k, k) == k else lender[k],
                    adapter_bytes=4 * read_adapter(r.source).num_parameters if r.source.adapter else 0,
                )
                for k, r in enumerate(here)
            ),
            workload=Workload(read.pairs.lengths, config.seed, read.pairs.scored),
            window=config.per_device_train_batch_size * self._accumulation() * self.cluster.gpus,
            tokens_per_forward=config.ref_tokens_per_forward,
            gradients_in_forward=config.head_backward == "in_forward"
            or (config.head_backward == "auto" and device_type == "cpu" and config.sequence_parallel_size == 1),
            device_type=device_type,
        )

    def _setting(self) -> Setting:
        config = self.config
        group = config.sequence_parallel_size
        return Setting(
            micro_batch=config.per_device_train_batch_size,
            checkpointing=bool(config.gradient_checkpointing),
            zero=self.zero,
            placement=config.ref_placement,
            shard_size=config.ref_shard_size,
            offload=config.ref_offload,
            live=config.ref_scoring == "live",
            max_tokens=config.max_tokens_per_micro_batch,
            sequence_parallel=group if self.cluster.gpus % group == 0 else 1,  # an error, which stands among the others
        )

    def _accumulation(self) -> int:
        return int(self.config.gradient_accumulation_steps)
