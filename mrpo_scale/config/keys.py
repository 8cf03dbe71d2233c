"""What a run is made of: flat keys from a YAML recipe, the command line or Python, all checked before any model loads.

Keys keep the names and defaults of transformers' TrainingArguments and TRL's DPOConfig, ModelConfig and ScriptArguments where those
have them; docs/from_trl.md has the table. Reading a recipe is in :mod:`mrpo_scale.config.recipe`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import TrainingArguments

from mrpo_scale.base.errors import ConfigError, one_line, refuse
from mrpo_scale.base.heartbeat import TIMEOUT
from mrpo_scale.base.ranks import all_gather_object, world_group
from mrpo_scale.config.adapter_keys import AdapterKeys
from mrpo_scale.config.checks import (
    check_world_size,
    iso_date,
    loader_mistakes,
    long_context_mistakes,
    training_mistakes,
    unsupported,
    value_mistakes,
)
from mrpo_scale.config.data_keys import (
    PLAIN_TEMPLATE,
    DatasetSpec,
    PairOptions,
    RepeatedPrompt,
    parse_columns,
    parse_datasets,
    parse_template_kwargs,
)
from mrpo_scale.config.ds_config import find_ds_config, read_ds_config
from mrpo_scale.config.fields import (
    AtLeast,
    Common,
    Decides,
    Hashed,
    OneOf,
    Other,
    Place,
    Role,
    UsedBy,
    key,
    keys_with,
    non_default_keys,
)
from mrpo_scale.config.hardware import Hardware, choose_bf16, missing_hardware, say_bf16
from mrpo_scale.config.launcher import (
    check_build_locks,
    check_restarts,
    is_launched,
    launch_alone,
    let_weights_be_saved,
)
from mrpo_scale.config.model_spec import DTYPES
from mrpo_scale.config.sampling_keys import SamplingKeys
from mrpo_scale.objective import AGGREGATES, CLIPS, LOSS_TYPES, REF_WEIGHTS, SAMPLED, Objective


@dataclass
class ScriptArguments:
    """Which models and which data: what ``MRPOTrainer`` takes as arguments when called from Python."""

    model_name_or_path: str | None = key(
        None, "Policy: hub id or folder. Its starting weights are reference 0, the anchor."
    )
    ref_models: list[str] = key(
        [],
        "References 1..K-1: hub ids, folders, or mappings {model, revision, dtype, chat_template, system, name, ...}; {url, model, "
        "tokenizer, revision, api_key_env, concurrency} of a model that vLLM or SGLang serves.",
    )
    dataset_name: str | list[str] = key(
        [],
        "Hub id, or a local json, jsonl, parquet, arrow or csv file or folder; or several, as names or mappings {name, config, "
        "split, weight, layout, subset, columns}.",
    )
    dataset_config: str | None = key(None, "Configuration name of a hub data set.")
    columns: dict[str, Any] | str | None = key(
        None, "Columns to rename, {prompt: question, ...}, or a list of those that are read."
    )
    dataset_train_split: str = key("train", "Split to train on, or a part of one, such as train[:90%%].")
    dataset_test_split: str = key("test", "Split to evaluate on, where the data set has it.")
    held_out: float | None = key(
        None, "Without a test split: fraction (below 1) or number of pairs to hold out, seeded."
    )
    train_subset: float | None = key(
        None, "Train on this fraction (below 1) or number of pairs, seeded; without a test split the rest is held out."
    )
    baselines: list[str] = key([], "Objectives to train first, for the table at the end, e.g. `dpo`.")

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, list) and len(self.dataset_name) == 1:
            self.dataset_name = self.dataset_name[0]
        self.columns = parse_columns(self.columns)  # type: ignore[assignment]

    @property
    def datasets(self) -> list[DatasetSpec]:
        """The data sets that ``dataset_name`` names; raises ConfigError where it does not make sense."""
        return parse_datasets(self.dataset_name)


@dataclass
class MRPOConfig(AdapterKeys, SamplingKeys, TrainingArguments):
    """Everything else: TrainingArguments, the objective, text, references.

    Raises:
        ConfigError: a value out of range or a combination without meaning; names the key, the value and the remedy.
    """

    # TRL's defaults where they differ from TrainingArguments'
    learning_rate: Decides[float] = key(1e-6, "The initial learning rate for AdamW.")
    logging_steps: Other[float] = key(10, "Log every this many optimizer steps.")
    gradient_checkpointing: Other[bool] = key(
        True, "Recompute activations in the backward pass: less memory, about 25%% slower."
    )
    bf16: Common[Decides[bool | None]] = key(  # type: ignore[assignment]
        None,
        "bf16 mixed precision: true, false, or auto: where the device has it in hardware (a CPU: AMX or AVX512-BF16) and fp16 is "
        "not set. Default: auto on a GPU, false on a CPU.",
    )
    report_to: Other[None | str | list[str]] = key(
        "tensorboard", "Where metrics go: tensorboard, wandb, trackio, none, ..."
    )

    resume_from_checkpoint: Place[str | None] = key(
        "auto",
        "auto: from the newest complete checkpoint of output_dir, if there is one; never: start anew; true: from the newest, which "
        "must be there; or a checkpoint.",
    )
    max_hours: Place[float | None] = key(
        None,
        "Stop so many hours after the start: finish the step, save, exit; leave room for both. The next start goes on.",
    )

    restore_callback_states_from_checkpoint: Other[bool] = key(
        True, "Go on with the state that callbacks, such as early stopping, had in the checkpoint."
    )

    # Objective (objective.py)
    objective: Common[Decides[Literal["mrpo", "dpo", "multi_dpo", "kd", "rlhf"]]] = key(
        "mrpo",
        "mrpo (Eq. 7), dpo (anchor alone), multi_dpo (Eq. 11); on responses that the policy samples, kd (DPO and KL to the other "
        "references) or rlhf (Eq. 6).",
    )
    beta: Decides[float] = key(0.1, "Strength of the tie to the reference; higher stays closer.")
    epsilon_max: Annotated[Decides[float], UsedBy(("mrpo", "multi_dpo", "kd"))] = key(
        0.1, "Trust region around the anchor, relative (Eq. 8-9)."
    )
    clip: Annotated[Decides[str], UsedBy(("mrpo", "multi_dpo", "kd"))] = key(
        "adaptive", f"Trust region, per response (Eq. 9), constant, or none: {', '.join(CLIPS)}."
    )
    ref_weights: Annotated[Decides[list[str]], UsedBy(("mrpo", "multi_dpo", *SAMPLED))] = key(
        ["confidence"],
        f"{', '.join(REF_WEIGHTS)} (by how often each ranks pairs of `weights_split` right), or K numbers that sum to 1, anchor "
        "first.",
    )
    weights_split: Common[Decides[float | None]] = key(
        None, "Fraction of the held-out pairs to set aside for `ref_weights: validation` (default there: 0.5)."
    )
    aggregate: Annotated[Decides[str], UsedBy(("mrpo",))] = key(
        "harmonic",
        f"Power mean of the K references: {', '.join(AGGREGATES)}, or an exponent (-1 is harmonic, 0 geometric, 1 arithmetic).",
    )
    loss_type: Decides[list[str]] = key(["sigmoid"], f"Outer loss, or several that are added: {', '.join(LOSS_TYPES)}.")
    loss_weights: Decides[list[float] | None] = key(None, "A factor for each of `loss_type` (default: 1 for each).")
    label_smoothing: Decides[float] = key(
        0.0, "Probability that a label is flipped, for sigmoid (cDPO), robust and exo_pair."
    )
    discopop_tau: Decides[float] = key(0.05, "Temperature of `loss_type: discopop`.")
    router_aux_loss_coef: Annotated[Decides[float | None], AtLeast(0)] = key(
        None,
        "Weight of the loss that keeps a mixture of experts' routers even (default: what the model's config says; 0: none).",
    )
    reference_margin: Decides[Literal["signed", "nonnegative"]] = key(
        "signed",
        "nonnegative: where the virtual reference prefers the rejected response, it counts as undecided (HyPO).",
    )

    # Models
    dtype: Annotated[Hashed[str], OneOf(DTYPES)] = key(
        "auto", "Weights of the policy: auto (float32), float32, bfloat16 or float16."
    )
    model_revision: Hashed[str | None] = key(None, "Revision of the policy on the hub.")
    attn_implementation: Hashed[str | None] = key(
        None,
        "sdpa, eager, flash_attention_2, varlen_spans, ...: default is the fastest that the model and the device take.",
    )
    trust_remote_code: Hashed[bool] = key(
        False, "Run Python code that comes with the policy. References have a key of their own."
    )
    disable_dropout: Decides[bool] = key(True, "Train without dropout.")
    anchor: Hashed[str | None] = key(
        None, "Take this model as reference 0 instead of the policy's own starting weights."
    )
    chat_template: Hashed[str | None] = key(
        None, "Jinja chat template, or a file with one, to use instead of the policy's."
    )
    system: Hashed[Literal["native", "merge", "error"]] = key("native", "System turns where the template rejects them.")
    plain_template: Hashed[str] = key(PLAIN_TEMPLATE, "Jinja chat template for models that have none.")
    template_date: Hashed[str | None] = key(
        None,
        "Date, such as 2026-11-26, for chat templates that print it. Default: that of the run or score cache that goes on, else "
        "today's.",
    )

    chat_template_kwargs: Hashed[dict[str, Any] | str | None] = key(
        None, "Arguments that every chat template gets, such as {enable_thinking: false}; a row's own column wins."
    )

    # Data
    dataset_layout: Hashed[str] = key("auto", "Layout of the rows, recognised by inspection unless named.")
    dataset_num_proc: Place[int | None] = key(None, "Processes for tokenizing.")
    ranked_pairs: Hashed[Literal["all", "best_vs_random", "best_vs_worst"]] = key(
        "all", "Pairs made of ranked or scored answers to one prompt."
    )
    score_columns: Hashed[list[str]] = key(["helpfulness"], "Layout helpsteer: the columns whose sum scores an answer.")
    max_length: Annotated[Hashed[int | None], AtLeast(2)] = key(
        1024, "Most tokens of prompt + response, in the policy's tokens; longer responses are cut."
    )
    repeated_prompt: Hashed[RepeatedPrompt] = key(
        "error",
        "Where both responses begin with their prompt in more than `max_bad_rows` of the pairs: error, strip it off, or keep it.",
    )
    on_bad_row: Common[Other[Literal["skip", "error"]]] = key(
        "skip", "What to do with a pair that cannot be scored by every model."
    )
    max_bad_rows: Common[Other[float]] = key(0.1, "Largest fraction of such pairs before the run stops.")

    max_tokens_per_micro_batch: Annotated[Other[int | None], AtLeast(1)] = key(
        None,
        "Cut each rank's pairs of a step into as few micro-batches as keep within so many padded tokens, instead of into "
        "`gradient_accumulation_steps` of `per_device_train_batch_size` pairs. Their product is a rank's pairs of a step still.",
    )

    # Long contexts
    sequence_parallel_size: Annotated[Other[int], AtLeast(1)] = key(
        1,
        "Ranks that compute the tokens of one pair together, for contexts that one rank cannot hold; divides the ranks and the "
        "policy's attention heads.",
    )
    activation_offloading: Other[bool] = key(
        False, "Keep what `gradient_checkpointing` saves of each layer, its input, in host memory."
    )

    # Output head
    head_impl: Other[Literal["auto", "triton", "torch"]] = key(
        "auto", "Log-prob kernels: Triton or torch; auto is logged."
    )
    head_backward: Other[Literal["auto", "in_forward", "recompute"]] = key(
        "auto", "Make the head's gradients in the forward (6TDV) or recompute logits in the backward (8TDV)."
    )

    # References
    shared_prompt: Other[Literal["auto", "true", "false"]] = key(
        "auto", "One forward over prompt, chosen and rejected."
    )
    ref_shard_size: Annotated[Other[int | None], AtLeast(1)] = key(
        None,
        "Ranks that share one copy of each reference. Default: the ranks of a node; on a CPU, where a node's ranks can map the "
        "weight files as they are, 1.",
    )
    ref_placement: Other[Literal["spread", "partition"]] = key(
        "spread", "spread: every reference on every shard group; partition: the ranks are divided among the references."
    )
    ref_offload: Other[bool] = key(False, "Keep references in host memory and stream each layer to the device.")
    ref_scoring: Common[Other[Literal["live", "precompute", "follow"]]] = key(
        "live",
        "Score in every step, before training, or wait for `mrpo score` elsewhere. Cached rows are never scored again.",
    )
    ref_cache_dir: Common[Place[str | None]] = key(
        None, "Folder of reference scores, kept between runs. precompute takes OUTPUT_DIR/ref_cache unless named."
    )
    ref_follow_timeout: Annotated[Other[float], AtLeast(0)] = key(
        1440.0, "Minutes without a new score before `ref_scoring: follow` gives up."
    )
    ref_tokens_per_forward: Annotated[Other[int], AtLeast(1)] = key(
        65536, "Padded tokens in one scoring forward; a larger window takes several."
    )

    # Many processes
    heartbeat_timeout: Annotated[Other[float], AtLeast(0)] = key(
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
        """Become a rank of the job, as TrainingArguments does when it is made. What would make the ranks wait for ever is refused
        here; :func:`prepare_launch` mends it, before."""
        machine = Hardware.of_this_machine(self.use_cpu)
        refuse(list(missing_hardware(self, self.head_impl, machine)))
        if not machine.gpu:
            say_bf16(self.non_default_keys.get("bf16"), bool(self.bf16))
            self.use_cpu = self.use_cpu or bool(
                self.bf16
            )  # without which transformers refuses bf16 where there is no GPU
        check_restarts()
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            check_build_locks()
        if self.deepspeed and not is_launched():
            launch_alone(str(self.deepspeed))
        if not is_launched():
            self.ddp_backend = None  # of a process alone, which transformers would look for other ranks with
        self._fill_in()
        check_world_size(self.world_size)
        self._check_bf16()
        if self.deepspeed_plugin is not None:
            if self.save_only_model and self.load_best_model_at_end:
                raise ConfigError(
                    "`save_only_model: true` with `load_best_model_at_end: true`: DeepSpeed loads the best step from a whole "
                    "checkpoint; set one of them to false."
                )
            let_weights_be_saved(self.deepspeed_plugin)

    def _check_bf16(self) -> None:
        """``bf16: auto`` is every rank's own answer. Collective over the world where it was asked."""
        if self.non_default_keys.get("bf16") != "auto" or self.world_size == 1:
            return
        chosen = all_gather_object(self.bf16, world_group())
        if len(set(chosen)) > 1:
            with_it, without = chosen.index(True), chosen.index(False)
            raise ConfigError(
                f"`bf16: auto`: the device of rank {with_it} has bf16 in hardware, that of rank {without} has not; "
                "set `bf16: false`, or `bf16: true`, for all of them."
            )

    def _fill_in(self) -> None:
        """transformers' own checks and derived values."""
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise ConfigError(one_line(error)) from error
        refuse(list(loader_mistakes(self)))

    def _normalise(self) -> None:
        """Accept what a person writes in Python or YAML: a word for a one-word list, a bool for auto|true|false."""
        if isinstance(self.ref_weights, str):
            self.ref_weights = [self.ref_weights]
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.score_columns, str):
            self.score_columns = [self.score_columns]
        for name in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.template_date is not None:
            self.template_date = iso_date(str(self.template_date))
        self.chat_template_kwargs = parse_template_kwargs(self.chat_template_kwargs) or None
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
        undecided = self.bf16 is None or self.bf16 == "auto"
        self.bf16 = not (undecided and self.fp16) and choose_bf16(self.bf16, gpu=on_gpu)
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
            reference_margin=self.reference_margin,
        )

    def _mistakes(self) -> Iterator[str]:
        yield from unsupported(self)
        yield from value_mistakes(self)
        yield from training_mistakes(self)
        yield from long_context_mistakes(self)
        yield from self.adapter_mistakes()
        yield from self.sampling_mistakes(self.objective, self.ref_scoring, self.ref_placement)
        if self.ref_scoring == "follow" and not self.ref_cache_dir:
            yield "`ref_scoring: follow` needs `ref_cache_dir`, the folder that `mrpo score` fills"
        if self.weights_split is not None and not 0 < self.weights_split < 1:
            yield f"`weights_split: {self.weights_split}` must be a fraction between 0 and 1"
        if not 0 <= self.max_bad_rows <= 1:
            yield f"`max_bad_rows: {self.max_bad_rows}` must be a fraction from 0 to 1"
        if self.max_hours is not None and not self.max_hours > 0:
            yield f"`max_hours: {self.max_hours}` must be above 0"

    def __getstate__(self) -> dict[str, Any]:
        """Without the hub token: the Trainer pickles its arguments into a file that push_to_hub uploads."""
        return {**self.__dict__, "hub_token": None}

    @property
    def samples(self) -> bool:
        """Whether the policy samples responses while it trains."""
        return self.objective in SAMPLED

    @property
    def anchor_is_policy(self) -> bool:
        """Whether reference 0 is the policy with its adapter off. Scores that go into a cache are a whole reference's, made before
        there is a policy; so are those that `ref_weights: validation` comes from."""
        live = (self.ref_cache_folder is None or self.samples) and not self.weights_from_validation
        return self.use_peft and live and not self.anchor

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
        if self.sequence_parallel_size > 1:  # a response's loss is known when all of its ranks have summed it up
            return False
        return self.head_backward == "in_forward" or (self.head_backward == "auto" and self.device.type == "cpu")

    @property
    def pair_options(self) -> PairOptions:
        """How ranked or scored answers become pairs."""
        return PairOptions(
            self.ranked_pairs,
            tuple(self.score_columns),
            self.seed,
            self.repeated_prompt,
            json.dumps(self.chat_template_kwargs or {}, sort_keys=True),
        )

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


def keys_of_role(role: Role | str) -> tuple[str, ...]:
    """Keys of a run, transformers' own among them, by what they are to it."""
    return keys_with(MRPOConfig, Role(role))
