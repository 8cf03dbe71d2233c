"""What a run is made of: flat keys from a YAML recipe, the command line or Python, all checked before any model loads.

Keys keep the names and defaults of transformers' TrainingArguments and TRL's DPOConfig, ModelConfig and ScriptArguments where those
have them; docs/from_trl.md has the table. Reading a recipe is in :mod:`mrpo_scale.config.recipe`.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from mrpo_scale.base.errors import ConfigError, one_line, refuse
from mrpo_scale.base.heartbeat import TIMEOUT
from mrpo_scale.base.untrusted import parse_json
from mrpo_scale.config.data_keys import PLAIN_TEMPLATE, RANKED_PAIRS, DatasetSpec, PairOptions, parse_datasets
from mrpo_scale.config.ds_config import find_ds_config, read_ds_config
from mrpo_scale.config.launcher import (
    check_restarts,
    clear_stale_build_locks,
    is_launched,
    launch_alone,
    let_weights_be_saved,
)
from mrpo_scale.objective import AGGREGATES, CLIPS, LOSS_TYPES, REF_WEIGHTS, Objective

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _key(default: Any, text: str) -> Any:
    """A dataclass field with the help text that ``--help`` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    """Which models and which data: what ``MRPOTrainer`` takes as arguments when called from Python."""

    model_name_or_path: str | None = _key(
        None, "Policy: hub id or folder. Its starting weights are reference 0, the anchor."
    )
    ref_models: list[str] = _key(
        [],
        "References 1..K-1: hub ids, folders, or mappings {model, revision, dtype, chat_template, system, name, ...}.",
    )
    dataset_name: str | list[str] = _key(
        [],
        "Hub id, or a local json, jsonl, parquet, arrow or csv file or folder; or several, as names or mappings {name, config, "
        "split, weight, layout}.",
    )
    dataset_config: str | None = _key(None, "Configuration name of a hub data set.")
    dataset_train_split: str = _key("train", "Split to train on.")
    dataset_test_split: str = _key("test", "Split to evaluate on, where the data set has it.")
    held_out: float | None = _key(
        None, "Without a test split: fraction (below 1) or number of pairs to hold out, seeded."
    )
    train_subset: float | None = _key(
        None, "Train on this fraction (below 1) or number of pairs, seeded; without a test split the rest is held out."
    )
    baselines: list[str] = _key([], "Objectives to train first, for the table at the end, e.g. `dpo`.")

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, list) and len(self.dataset_name) == 1:
            self.dataset_name = self.dataset_name[0]

    @property
    def datasets(self) -> list[DatasetSpec]:
        """The data sets that ``dataset_name`` names; raises ConfigError where it does not make sense."""
        return parse_datasets(self.dataset_name)


@dataclass(frozen=True)
class Hardware:
    """What keys of a run may ask of a machine."""

    gpu: bool
    bf16: bool
    tf32: bool

    @classmethod
    def of_this_machine(cls, use_cpu: bool) -> Hardware:
        gpu = torch.cuda.is_available() and not use_cpu
        return cls(
            gpu, bf16=is_torch_bf16_gpu_available() and not use_cpu, tf32=is_torch_tf32_available() and not use_cpu
        )


@dataclass
class MRPOConfig(TrainingArguments):
    """Everything else: TrainingArguments, the objective, text, references.

    Raises:
        ConfigError: a value out of range or a combination without meaning; names the key, the value and the remedy.
    """

    # TRL's defaults where they differ from TrainingArguments'
    learning_rate: float = _key(1e-6, "The initial learning rate for AdamW.")
    logging_steps: float = _key(10, "Log every this many optimizer steps.")
    gradient_checkpointing: bool = _key(
        True, "Recompute activations in the backward pass: less memory, about 25%% slower."
    )
    bf16: bool | None = _key(  # type: ignore[assignment]
        None, "bf16 mixed precision. Default: where the device has it in hardware and fp16 is not set."
    )
    report_to: None | str | list[str] = _key("tensorboard", "Where metrics go: tensorboard, wandb, trackio, none, ...")

    resume_from_checkpoint: str | None = _key(
        "auto",
        "auto: from the newest complete checkpoint of output_dir, if there is one; never: start anew; true: from the newest, which "
        "must be there; or a checkpoint.",
    )
    max_hours: float | None = _key(
        None,
        "Stop so many hours after the start: finish the step, save, exit; leave room for both. The next start goes on.",
    )

    restore_callback_states_from_checkpoint: bool = _key(
        True, "Go on with the state that callbacks, such as early stopping, had in the checkpoint."
    )

    # Objective (objective.py)
    objective: Literal["mrpo", "dpo", "multi_dpo"] = _key(
        "mrpo", "mrpo (Eq. 7), dpo (anchor alone) or multi_dpo (Eq. 11)."
    )
    beta: float = _key(0.1, "Strength of the tie to the reference; higher stays closer.")
    epsilon_max: float = _key(0.1, "Trust region around the anchor, relative (Eq. 8-9).")
    clip: str = _key("adaptive", f"Trust region, per response (Eq. 9), constant, or none: {', '.join(CLIPS)}.")
    ref_weights: list[str] = _key(
        ["confidence"],
        f"{', '.join(REF_WEIGHTS)} (by how often each ranks pairs of `weights_split` right), or K numbers that sum to 1, anchor "
        "first.",
    )
    weights_split: float | None = _key(
        None, "Fraction of the held-out pairs to set aside for `ref_weights: validation` (default there: 0.5)."
    )
    aggregate: str = _key(
        "harmonic",
        f"Power mean of the K references: {', '.join(AGGREGATES)}, or an exponent (-1 is harmonic, 0 geometric, 1 arithmetic).",
    )
    loss_type: list[str] = _key(["sigmoid"], f"Outer loss, or several that are added: {', '.join(LOSS_TYPES)}.")
    loss_weights: list[float] | None = _key(None, "A factor for each of `loss_type` (default: 1 for each).")
    label_smoothing: float = _key(0.0, "Probability that a label is flipped, for sigmoid (cDPO), robust and exo_pair.")
    discopop_tau: float = _key(0.05, "Temperature of `loss_type: discopop`.")

    # Models
    dtype: str = _key("auto", "Weights of the policy: auto (float32), float32, bfloat16 or float16.")
    model_revision: str | None = _key(None, "Revision of the policy on the hub.")
    attn_implementation: str | None = _key(None, "sdpa, eager, flash_attention_2, ...: default is the model's.")
    trust_remote_code: bool = _key(
        False, "Run Python code that comes with the policy. References have a key of their own."
    )
    disable_dropout: bool = _key(True, "Train without dropout.")
    anchor: str | None = _key(None, "Take this model as reference 0 instead of the policy's own starting weights.")
    chat_template: str | None = _key(None, "Jinja chat template, or a file with one, to use instead of the policy's.")
    system: Literal["native", "merge", "error"] = _key("native", "System turns where the template rejects them.")
    plain_template: str = _key(PLAIN_TEMPLATE, "Jinja chat template for models that have none.")
    template_date: str | None = _key(
        None,
        "Date, such as 2026-11-26, for chat templates that print it. Default: that of the run or score cache that goes on, else "
        "today's.",
    )

    # Data
    dataset_layout: str = _key("auto", "Layout of the rows, recognised by inspection unless named.")
    dataset_num_proc: int | None = _key(None, "Processes for tokenizing.")
    ranked_pairs: Literal["all", "best_vs_random", "best_vs_worst"] = _key(
        "all", "Pairs made of ranked or scored answers to one prompt."
    )
    score_columns: list[str] = _key(["helpfulness"], "Layout helpsteer: the columns whose sum scores an answer.")
    max_length: int | None = _key(
        1024, "Most tokens of prompt + response, in the policy's tokens; longer responses are cut."
    )
    on_bad_row: Literal["skip", "error"] = _key("skip", "What to do with a pair that cannot be scored by every model.")
    max_bad_rows: float = _key(0.1, "Largest fraction of such pairs before the run stops.")

    # Output head
    head_impl: Literal["auto", "triton", "torch"] = _key("auto", "Log-prob kernels: Triton or torch; auto is logged.")
    head_backward: Literal["auto", "in_forward", "recompute"] = _key(
        "auto", "Make the head's gradients in the forward (6TDV) or recompute logits in the backward (8TDV)."
    )

    # References
    shared_prompt: Literal["auto", "true", "false"] = _key("auto", "One forward over prompt, chosen and rejected.")
    ref_shard_size: int | None = _key(
        None,
        "Ranks that share one copy of each reference. Default: the ranks of a node; on a CPU, where a node's ranks can map the "
        "weight files as they are, 1.",
    )
    ref_placement: Literal["spread", "partition"] = _key(
        "spread", "spread: every reference on every shard group; partition: the ranks are divided among the references."
    )
    ref_offload: bool = _key(False, "Keep references in host memory and stream each layer to the device.")
    ref_scoring: Literal["live", "precompute", "follow"] = _key(
        "live",
        "Score in every step, before training, or wait for `mrpo score` elsewhere. Cached rows are never scored again.",
    )
    ref_cache_dir: str | None = _key(
        None, "Folder of reference scores, kept between runs. precompute takes OUTPUT_DIR/ref_cache unless named."
    )
    ref_follow_timeout: float = _key(1440.0, "Minutes without a new score before `ref_scoring: follow` gives up.")
    ref_tokens_per_forward: int = _key(65536, "Padded tokens in one scoring forward; a larger window takes several.")

    # Many processes
    heartbeat_timeout: float = _key(
        TIMEOUT,
        "Seconds without a sign of life after which a rank counts as dead and the job ends on every host; 0: never.",
    )

    def __post_init__(self) -> None:
        self.non_default_keys = non_default_keys(
            self
        )  # before anything is filled in: what a model card can say of the run
        self._normalise()
        refuse(list(self._mistakes()))
        self.aggregate = str(self.build_objective().aggregate)  # one spelling: -1 and harmonic are the same run
        self._join()

    def _join(self) -> None:
        """Become a rank of the job. Here and not in the commands, because a Python script under a launcher starts here too, and an
        attempt that can only wait for dead ranks waits in this place."""
        refuse(list(self.missing_hardware(Hardware.of_this_machine(self.use_cpu))))
        check_restarts()
        clear_stale_build_locks()
        if self.deepspeed and not is_launched():
            launch_alone(str(self.deepspeed))
        self._fill_in()
        check_world_size(self.world_size)
        if self.deepspeed_plugin is not None:
            if self.save_only_model and self.load_best_model_at_end:
                raise ConfigError(
                    "`save_only_model: true` with `load_best_model_at_end: true`: DeepSpeed loads the best step from a whole "
                    "checkpoint; set one of them to false."
                )
            let_weights_be_saved(self.deepspeed_plugin)

    def _fill_in(self) -> None:
        """transformers' own checks and derived values."""
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise ConfigError(one_line(error)) from error

    def _normalise(self) -> None:
        """Accept what a person writes in Python or YAML: a word for a one-word list, a bool for auto|true|false."""
        if isinstance(self.ref_weights, str):
            self.ref_weights = [self.ref_weights]
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.score_columns, str):
            self.score_columns = [self.score_columns]
        if self.template_date is not None:
            self.template_date = iso_date(str(self.template_date))
        self.shared_prompt = str(self.shared_prompt).lower()  # type: ignore[assignment]
        if self.report_to is None or self.report_to is False or self.report_to == []:
            self.report_to = "none"
        if self.dtype is None:
            self.dtype = "auto"
        if isinstance(self.deepspeed, str):
            self.deepspeed = find_ds_config(self.deepspeed)
        elif self.deepspeed is not None:
            read_ds_config(self.deepspeed)
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = not self.fp16 and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self.ddp_backend is None and not on_gpu and launched:
            # Without a named backend, DeepSpeed on CPU lets each process train alone as a world of one.
            self.ddp_backend = "gloo"
        if getattr(self, "activation_checkpointing", False) is None:  # the same key's name from transformers 5.2x on
            self.activation_checkpointing = self.gradient_checkpointing
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False  # a NaN loss stops the run; it is never averaged away

    @property
    def checkpoints_activations(self) -> bool:
        """Whether layers of the policy are computed again in the backward."""
        return bool(getattr(self, "activation_checkpointing", self.gradient_checkpointing))

    def build_objective(self) -> Objective:
        """The :class:`Objective` of these keys; raises ConfigError where they do not make one."""
        weights: Any = self.ref_weights[0] if len(self.ref_weights) == 1 else None
        if weights not in REF_WEIGHTS:
            try:
                weights = [float(w) for w in self.ref_weights]
            except ValueError:
                given = " ".join(map(str, self.ref_weights))
                raise ConfigError(
                    f"`ref_weights: {given}` is neither {', '.join(REF_WEIGHTS)} nor a list of numbers."
                ) from None
        return Objective(
            name=self.objective,
            beta=self.beta,
            epsilon_max=self.epsilon_max,
            clip=self.clip,
            ref_weights=weights,
            aggregate=self.aggregate,
            loss_type=tuple(self.loss_type),
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
        )

    def _mistakes(self) -> Iterator[str]:
        """What is wrong with the values alone, whatever the machine. What this machine lacks is found in preflight.py."""
        for key, (given, remedy) in self._unsupported().items():
            if given:
                yield f"`{key}: {getattr(self, key)}` is not supported: {remedy}"
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                yield _unknown_value(key, getattr(self, key), allowed)
        if self.bf16 and self.fp16:
            yield "`bf16: True` and `fp16: True` exclude each other; remove one"
        if str(getattr(self.save_strategy, "value", self.save_strategy)) == "best" and not self.metric_for_best_model:
            yield "`save_strategy: best` needs `metric_for_best_model`, such as rewards/accuracies or loss"
        if self.ref_scoring == "follow" and not self.ref_cache_dir:
            yield "`ref_scoring: follow` needs `ref_cache_dir`, the folder that `mrpo score` fills"
        if self.weights_split is not None and not 0 < self.weights_split < 1:
            yield f"`weights_split: {self.weights_split}` must be a fraction between 0 and 1"
        if not 0 <= self.max_bad_rows <= 1:
            yield f"`max_bad_rows: {self.max_bad_rows}` must be a fraction from 0 to 1"
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is not None and value < least:
                yield f"`{key}: {value}` must be at least {least}"
        if self.max_hours is not None and not self.max_hours > 0:
            yield f"`max_hours: {self.max_hours}` must be above 0"
        for key in ("seed", "data_seed"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1 << 32:
                yield f"`{key}: {value}` must be from 0 to {(1 << 32) - 1}"
        if not math.isfinite(self.learning_rate) or self.learning_rate < 0:
            yield f"`learning_rate: {self.learning_rate}` must be 0 or more"

    def missing_hardware(self, machine: Hardware) -> Iterator[str]:
        """Keys that ask for more than the machine of the run has."""
        if self.fp16 and not machine.gpu:
            yield "`fp16: True` needs a GPU, and there is none (on a CPU only the references would be rounded); remove the key"
        if self.bf16 and not machine.bf16 and not self.use_cpu:
            yield (
                "`bf16: True` needs a GPU that computes in bf16, and there is none; remove the key, or set `use_cpu: true` for "
                "bf16 on a CPU, which is slow"
            )
        if self.tf32 and not machine.tf32:
            yield "`tf32: True` needs a GPU with TF32 (NVIDIA Ampere or later), and there is none; remove the key"
        if self.head_impl == "triton" and not machine.gpu:
            yield "`head_impl: triton` needs a CUDA GPU and there is none; use `auto` or `torch`"

    def _unsupported(self) -> dict[str, tuple[Any, str]]:
        """Keys of transformers' that have no meaning here: whether one is set, and what to do instead."""
        whole = "the weights would be rounded for good before they are saved; pairs are measured in the precision of training"
        return {
            "auto_find_batch_size": (self.auto_find_batch_size, "set `per_device_train_batch_size`"),
            "fsdp": (
                self.fsdp,
                "the policy is sharded by DeepSpeed ZeRO-3; use launch/accelerate/eight_gpu_zero3.yaml",
            ),
            "label_smoothing_factor": (self.label_smoothing_factor, "use `label_smoothing`"),
            "batch_eval_metrics": (self.batch_eval_metrics, "`compute_metrics` gets the whole set at once"),
            "include_for_metrics": (
                self.include_for_metrics,
                "`compute_metrics` gets the log-probs of policy and references",
            ),
            "ignore_data_skip": (self.ignore_data_skip, "a run that goes on would train rows twice"),
            "train_sampling_strategy": (
                getattr(self, "train_sampling_strategy", "random") not in ("random", "sequential"),
                "use random or sequential; pairs of a step are grouped by length already",
            ),
            "use_liger_kernel": (
                self.use_liger_kernel,
                "Liger replaces the forward that scores pairs; the fused head here does its work already, remove the key",
            ),
            "bf16_full_eval": (self.bf16_full_eval, whole),
            "fp16_full_eval": (self.fp16_full_eval, whole),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without the hub token: the Trainer pickles its arguments into a file that push_to_hub uploads."""
        return {**self.__dict__, "hub_token": None}

    @property
    def folder(self) -> Path:
        """``output_dir``, where everything that this run writes goes."""
        return Path(str(self.output_dir))

    @property
    def window_size(self) -> int:
        """Pairs per optimizer step over all ranks."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def weights_from_validation(self) -> bool:
        return list(self.ref_weights) == ["validation"]

    @property
    def weights_fraction(self) -> float | None:
        """Of the held-out pairs, the fraction that only `ref_weights: validation` sees; None: nothing is set aside."""
        return self.weights_split or (0.5 if self.weights_from_validation else None)

    @property
    def ref_cache_folder(self) -> Path | None:
        """Where reference scores are kept; None: nowhere."""
        if self.ref_cache_dir:
            return Path(self.ref_cache_dir).expanduser()
        return self.folder / "ref_cache" if self.ref_scoring == "precompute" else None

    @property
    def gradients_in_forward(self) -> bool:
        """``head_backward: auto`` is what was measured faster: in the forward on a CPU (benchmarks/results). On a GPU neither was
        measured yet, so it stays with the one that holds no float32 weight gradient through the body's backward."""
        return self.head_backward == "in_forward" or (self.head_backward == "auto" and self.device.type == "cpu")

    @property
    def pair_options(self) -> PairOptions:
        """How ranked or scored answers become pairs."""
        return PairOptions(self.ranked_pairs, tuple(self.score_columns), self.seed)

    @property
    def policy_dtype(self) -> torch.dtype:
        """Float32 unless named: mixed precision and ZeRO keep bf16 copies of float32 weights themselves."""
        return torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)

    def reference_dtype(self, name: str) -> torch.dtype:
        """``auto``: the precision the policy computes in, so that step 0 compares like with like."""
        if name != "auto":
            return getattr(torch, name)
        if self.dtype != "auto":
            return self.policy_dtype
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass(frozen=True)
class ModelSpec:
    """One model as a recipe names it. A reference is written as its path or as a mapping of these keys."""

    model: str
    name: str = ""
    revision: str | None = None
    dtype: str = "auto"
    chat_template: str | None = None
    system: str = "native"
    trust_remote_code: bool = False
    attn_implementation: str | None = None


def parse_ref_models(ref_models: Sequence[str | Mapping[str, Any]], key: str = "ref_models") -> list[ModelSpec]:
    """Models as typed under ``key``: paths, hub ids, mappings, or mappings as JSON text (how the command line carries them).

    Raises:
        ConfigError: an unknown key of a mapping, or a mapping without ``model``.
    """
    known = {f.name for f in fields(ModelSpec)}
    specs: list[ModelSpec] = []
    for entry in ref_models:
        values: Any = entry
        if isinstance(entry, str):
            try:
                values = parse_json(entry) if entry.lstrip().startswith("{") else {"model": entry}
            except ValueError as error:
                raise ConfigError(f"`{key}: {entry}` is not a model name nor a JSON mapping: {error}.") from None
        if not isinstance(values, Mapping):
            what = type(entry).__name__  # not its text: a loaded model's is a page long
            raise ConfigError(
                f"`{key}` holds a {what}; write a folder, a hub id, or a mapping with `model`. A loaded model goes to a folder "
                "first, with save_pretrained (its tokenizer too)."
            )
        unknown = set(values) - known
        if unknown or "model" not in values:
            problem = f"unknown key `{min(unknown)}`" if unknown else "key `model` is missing"
            raise ConfigError(f"`{key}: {dict(values)}`: {problem}; known keys are {', '.join(sorted(known))}.")
        values = {k: v for k, v in values.items() if v is not None}
        for k, value in values.items():
            # Not the truth of the value: the text "false" is true, and would let the model's code run.
            wanted = bool if k == "trust_remote_code" else str
            if not isinstance(value, wanted):
                what = "true or false, without quotes" if wanted is bool else "text"
                raise ConfigError(f"`{key}.{k}: {value!r}` must be {what}.")
        spec = ModelSpec(**values)
        _within(f"{key}.dtype", spec.dtype, DTYPES)
        _within(f"{key}.system", spec.system, ("native", "merge", "error"))
        specs.append(spec)
    return specs


def iso_date(value: str) -> str:
    """``template_date`` as typed, checked. Raises ConfigError."""
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
        raise ConfigError(f"`template_date: {value}` is no date; write it as 2026-11-26.") from None


def check_world_size(world_size: int) -> None:
    """A launcher that started N processes must have got a world of N: otherwise each one silently trains alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise ConfigError(
            f"the launcher started WORLD_SIZE={launched} processes but this process sees a world of {world_size}: each would train "
            "alone. On CPU set `ddp_backend: gloo`; check `num_processes` and `distributed_type` of the accelerate config."
        )


#: Defaults that HfArgumentParser turns into another value on the way.
_REWRITTEN = {"debug": None, "include_num_input_tokens_seen": False}


def non_default_keys(arguments: Any) -> dict[str, Any]:
    """{key: value} of a dataclass where it differs from the default, tokens left out."""
    values = {}
    for f in fields(arguments):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = getattr(arguments, f.name)
        if value not in (default, _REWRITTEN.get(f.name, default)) and not f.name.endswith("token"):
            values[f.name] = value
    return values


#: Values of keys that are written as text.
_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": DTYPES,
    "shared_prompt": ("auto", "true", "false"),
    "system": ("native", "merge", "error"),
    "head_impl": ("auto", "triton", "torch"),
    "head_backward": ("auto", "in_forward", "recompute"),
    "on_bad_row": ("skip", "error"),
    "ref_scoring": ("live", "precompute", "follow"),
    "ref_placement": ("spread", "partition"),
    "ranked_pairs": RANKED_PAIRS,
}
_LEAST = {
    "max_length": 2,
    "ref_shard_size": 1,
    "ref_tokens_per_forward": 1,
    "ref_follow_timeout": 0,
    "heartbeat_timeout": 0,
}


def _unknown_value(key: str, value: object, allowed: tuple[str, ...]) -> str:
    return f"`{key}: {value}` is not known; choose one of {', '.join(allowed)}"


def _within(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{_unknown_value(key, value, allowed)}.")
