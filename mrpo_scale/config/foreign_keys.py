"""The DPO keys of axolotl, LLaMA-Factory, open-instruct, OpenRLHF and ms-swift: what each is here, or why it is not carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.ds_config import resource
from mrpo_scale.config.foreign import Conversion, Keys, Trainer, choose, deepspeed_name, sets_with_parts

_ANALYSED = "the layout of the rows is recognised"
_TEMPLATE = "each model is read with the chat template of its own folder; to use another one, `chat_template: FILE`"
_TOKENIZER = "each model is read with its own tokenizer"
_FAST = "fast tokenizers are used"
_CACHED = "tokens and pairs are kept beside the data"
_PACKED = "pairs are packed without padding already"
_CURVES = "curves are always drawn"
_OWN_SERVICE = "a service of its own cluster"
_WANDB = "wandb reads it from the environment (WANDB_ENTITY, WANDB_PROJECT, ...)"
_COLUMNS = "rename the column in the data"
_NO_REFERENCE = "that loss has no reference, which is what this project is about"


def _deepspeed(rest: Keys, done: Conversion) -> None:
    if (value := rest.pop("deepspeed", None)) is not None:
        deepspeed_name(value, [path.stem for path in resource("ds_configs").glob("*.json")], done)


def _number(rest: Keys, key: str, default: float = 0.0) -> float:
    value = rest.pop(key, None)
    try:
        return default if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"`{key}: {value}` must be a number.") from None


def _times_per_epoch(rest: Keys, done: Conversion, key: str, kind: str) -> None:
    """`evals_per_epoch` and `saves_per_epoch`: below 1, `eval_steps` and `save_steps` are fractions of the run."""
    times, epochs = _number(rest, key, -1), float(rest.get("num_epochs") or 1)
    if times == 0:
        done.values[f"{kind}_strategy"] = "no"
    elif times > 0:
        done.values |= {f"{kind}_strategy": "steps", f"{kind}_steps": round(1 / (times * epochs), 6)}


def _axolotl(rest: Keys, done: Conversion, gpus: int | None) -> None:
    kinds = {"dpo": "sigmoid", "ipo": "ipo"}
    kind = choose("rl", rest.pop("rl", None), kinds, "no recipe of preference pairs around a reference")
    done.losses(kind, {"sft": _number(rest, "rpo_alpha")})
    entries = []
    for one in rest.pop("datasets", None) or ():
        one = dict(one)
        names = [one.pop("path")] if one.get("path") else list(one.pop("data_files", None) or ())
        carried = {here: one.pop(there) for there, here in (("name", "config"), ("split", "split")) if one.get(there)}
        entries += [
            {"name": name, **{k: v for k, v in carried.items() if (k, v) != ("split", "train")}} for name in names
        ]
        _axolotl_columns(one, done)
    if entries:
        done.add_sets(entries)
    if rest.get("bf16") in ("auto", "full"):
        value = rest.pop("bf16")
        if value == "full":
            done.values["dtype"] = "bfloat16"
        done.needless[f"bf16: {value}"] = "bf16 mixed precision is the default where the device has it"
    attentions = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
    for key, name in attentions.items():
        if rest.pop(key, None):
            done.values["attn_implementation"] = name
    if isinstance(rest.get("gradient_checkpointing"), str):
        value, rest["gradient_checkpointing"] = rest["gradient_checkpointing"], True
        done.lose("gradient_checkpointing", value, "layers are computed again, and not kept in host memory")
    held = _number(rest, "val_set_size")
    if held:
        done.values["held_out"] = int(held) if held >= 1 else held
    elif rest.pop("evals_per_epoch", None):
        done.needless["evals_per_epoch"] = "nothing is held out"
    _times_per_epoch(rest, done, "evals_per_epoch", "eval")
    _times_per_epoch(rest, done, "saves_per_epoch", "save")
    if project := rest.pop("wandb_project", None):
        done.values |= {"report_to": "wandb", "project": project}
    _deepspeed(rest, done)


_AXOLOTL_COLUMNS = {
    "field_messages": ("messages", "prompt"),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
}


def _axolotl_columns(one: Mapping[str, Any], done: Conversion) -> None:
    for key, value in one.items():
        if key in ("type", "ds_type", "roles") or (
            key == "message_property_mappings" and all(k == v for k, v in value.items())
        ):
            done.needless[f"datasets: {key}"] = _ANALYSED
        elif value not in _AXOLOTL_COLUMNS.get(key, ()):
            done.lose(
                f"datasets: {key}", value, _COLUMNS if key.startswith("field_") else "a key of axolotl's data sets"
            )


AXOLOTL = Trainer(
    title="axolotl",
    marks=("base_model", "sequence_len", "micro_batch_size"),
    program=r"axolotl",
    make=_axolotl,
    renamed={
        "base_model": "model_name_or_path",
        "revision_of_model": "model_revision",
        "dpo_beta": "beta",
        "rl_beta": "beta",
        "dpo_label_smoothing": "label_smoothing",
        "sequence_len": "max_length",
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "num_epochs": "num_train_epochs",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
        "wandb_name": "run_name",
        "dataset_processes": "dataset_num_proc",
        "precompute_ref_log_probs": "precompute_ref_log_probs",
    },
    needless={
        **dict.fromkeys(("model_type", "base_model_config"), "the kind of the model is in its config"),
        **dict.fromkeys(("tokenizer_type", "special_tokens", "tokens"), _TOKENIZER),
        **dict.fromkeys(("chat_template", "default_system_message"), _TEMPLATE),
        **dict.fromkeys(("dataset_prepared_path", "skip_prepare_dataset", "shuffle_merged_datasets"), _CACHED),
        **dict.fromkeys(("sample_packing", "eval_sample_packing", "pad_to_sequence_len"), _PACKED),
        **dict.fromkeys(("train_on_inputs", "dpo_use_logits_to_keep"), "responses alone are scored"),
        **dict.fromkeys(
            ("strict", "debug", "local_rank", "eval_table_size", "eval_table_max_new_tokens"), "of no use here"
        ),
        **dict.fromkeys(("wandb_entity", "wandb_watch", "wandb_log_model", "wandb_run_id"), _WANDB),
    },
    lost={
        **dict.fromkeys(("lora_model_dir", "peft_use_dora"), "all weights train here"),
        "test_datasets": "name their split `dataset_test_split`, or hold out with `held_out`",
        "early_stopping_patience": "from Python: `callbacks=[EarlyStoppingCallback(...)]`",
        "dataset_exact_deduplication": "duplicates are not removed; remove them from the data",
        "plugins": "axolotl's own",
    },
)


def _llama_factory(rest: Keys, done: Conversion, gpus: int | None) -> None:
    choose("stage", rest.pop("stage", None), {"dpo": "dpo"}, "no recipe of preference pairs")
    kinds = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
    kind = choose("pref_loss", rest.pop("pref_loss", "sigmoid"), kinds, _NO_REFERENCE)
    done.losses(kind, {"bco_pair": _number(rest, "pref_bco_weight"), "sft": _number(rest, "pref_ftx")})
    tuning = rest.pop("finetuning_type", "lora")
    if tuning != "full":
        done.lose("finetuning_type", tuning, "all weights train here, for which the learning rate is usually lower")
    names = rest.pop("dataset", None)
    if names:
        done.lose(
            "dataset", names, "names of LLaMA-Factory's dataset_info.json: write the hub ids or files as `dataset_name`"
        )
    if attention := rest.pop("flash_attn", None):
        words = {
            "fa2": "flash_attention_2",
            "sdpa": "sdpa",
            "disabled": "eager",
            "auto": "",
            "True": "flash_attention_2",
        }
        name = choose("flash_attn", attention, words, "another attention")
        done.values |= {"attn_implementation": name} if name else {}
    if rest.pop("pure_bf16", None):
        done.values["dtype"] = "bfloat16"
    if (held := _number(rest, "val_size")) > 0:
        done.values["held_out"] = int(held) if held >= 1 else held
    _deepspeed(rest, done)


LLAMA_FACTORY = Trainer(
    title="LLaMA-Factory",
    marks=("stage", "finetuning_type", "cutoff_len", "pref_beta"),
    program=r"llamafactory-cli|llamafactory",
    make=_llama_factory,
    renamed={
        "pref_beta": "beta",
        "dpo_label_smoothing": "label_smoothing",
        "cutoff_len": "max_length",
        "ref_model": "anchor",
        "enable_liger_kernel": "use_liger_kernel",
    },
    needless={
        **dict.fromkeys(("template", "default_system"), _TEMPLATE),
        **dict.fromkeys(("overwrite_cache", "tokenized_path", "cache_dir"), _CACHED),
        **dict.fromkeys(("packing", "neat_packing"), _PACKED),
        "plot_loss": _CURVES,
        "use_fast_tokenizer": _FAST,
    },
    lost={
        **dict.fromkeys(("dataset_dir", "media_dir"), "paths in `dataset_name` are enough"),
        **dict.fromkeys(
            ("freeze_vision_tower", "freeze_multi_modal_projector", "image_max_pixels"), "text alone is trained"
        ),
        "eval_dataset": "name a split of the data with `dataset_test_split`",
        "max_samples": "write it as `subset` of each set of `dataset_name`",
        "adapter_name_or_path": "merge the adapter into the model first",
    },
)


def _open_instruct(rest: Keys, done: Conversion, gpus: int | None) -> None:
    named = rest.pop("dpo_loss_type", None) or rest.pop("loss_type", None)
    kinds = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}
    kind = choose(
        "dpo_loss_type", named or "dpo_norm", kinds, _NO_REFERENCE if named == "simpo" else "not a loss of this project"
    )
    done.losses(kind, {})
    done.values["beta"] = _number(rest, "dpo_beta", _number(rest, "beta", 5.0))
    if named is None:
        done.needless["dpo_loss_type"] = "is not given: open-instruct's default is dpo_norm, with beta 5"
    done.values["label_smoothing"] = _number(rest, "dpo_label_smoothing")
    _open_instruct_sets(rest, done)
    if rest.pop("use_flash_attn", None):
        done.values["attn_implementation"] = "flash_attention_2"
    steps = rest.pop("checkpointing_steps", None)
    if steps == "epoch":
        done.values["save_strategy"] = "epoch"
    elif steps is not None:
        done.values |= {"save_strategy": "steps", "save_steps": int(steps)}
    tracked, where = rest.pop("with_tracking", False), rest.pop("report_to", None)
    done.values["report_to"] = (where or "wandb") if tracked else "none"
    for key in ("tokenizer_name", "tokenizer_name_or_path"):
        value = rest.pop(key, None)
        if value not in (None, rest.get("model_name_or_path")):
            done.lose(key, value, "the tokenizer is the model's own; put the other one into the model's folder")
    clip = _number(rest, "clip_grad_norm", -1)
    done.values["max_grad_norm"] = max(clip, 0.0)  # open-instruct does not clip unless told to


def _open_instruct_sets(rest: Keys, done: Conversion) -> None:
    """Fractions up to 1 of a set, or a number of its rows."""
    words = list(rest.pop("dataset_mixer_list", None) or ())
    parts: dict[str, Any] = dict(rest.pop("dataset_mixer", None) or {})
    parts |= {str(name): _part(part) for name, part in zip(words[::2], words[1::2], strict=False)}
    splits = rest.pop("dataset_mixer_list_splits", None) or []
    if parts:
        done.add_sets(sets_with_parts(parts, [splits] if isinstance(splits, str) else splits))
    if (most := rest.pop("max_train_samples", None)) is not None:
        done.lose("max_train_samples", most, "write it as `subset` of the set in `dataset_name`")


def _part(value: Any) -> float | int:
    """A whole number above 1 counts rows."""
    number = float(value)
    return int(number) if number > 1 and number.is_integer() and "." not in str(value) else number


OPEN_INSTRUCT = Trainer(
    title="open-instruct",
    marks=("dpo_loss_type", "dpo_beta", "max_seq_length", "use_slow_tokenizer", "dataset_mixer_list"),
    program=r"\S*(?:dpo_tune\w*|open_instruct/dpo)\.py",
    make=_open_instruct,
    renamed={
        "max_seq_length": "max_length",
        "num_epochs": "num_train_epochs",
        "keep_last_n_checkpoints": "save_total_limit",
        "exp_name": "run_name",
    },
    needless={
        "use_slow_tokenizer": _FAST,
        "concatenated_forward": "each pair is one forward over its prompt and both responses",
        "dataset_skip_cache": _CACHED,
        "dataset_local_cache_dir": _CACHED,
        "cache_dataset_only": _CACHED,
        "packing": _PACKED,
        "reference_logprobs_cache_path": "`ref_cache_dir` keeps reference scores",
        **dict.fromkeys(("try_launch_beaker_eval_jobs", "hf_metadata_dataset", "gs_bucket_path"), _OWN_SERVICE),
        **dict.fromkeys(("oe_eval_*", "eval_*", "beaker_*", "add_seed_and_date_to_exp_name"), _OWN_SERVICE),
        "wandb_*": _WANDB,
    },
    lost={
        "add_bos": "the chat template decides whether a text begins with it",
        "chat_template_name": _TEMPLATE,
        "dpo_use_paged_optimizer": "write `optim: paged_adamw_32bit`",
        "tokenizer_revision": _TOKENIZER,
        "load_balancing_loss": "no auxiliary loss is added",
    },
)


def _openrlhf(rest: Keys, done: Conversion, gpus: int | None) -> None:
    for key in [key for key in rest if "." in key]:  # from 0.10 on: --model.beta, --data.dataset, ...
        rest.setdefault(key.rpartition(".")[2], rest.pop(key))
    # Its IPO is of whole responses: it does not divide by tokens.
    done.losses("ipo_whole" if rest.pop("ipo", False) else "sigmoid", {"sft": _number(rest, "nll_loss_coef")})
    _openrlhf_sets(rest, done)
    _openrlhf_batch(rest, done, gpus)
    if (stage := rest.pop("zero_stage", None)) is not None:
        done.values |= {"deepspeed": f"zero{stage}"} if str(stage) in ("2", "3") else {}
    if rest.pop("bf16", False) or rest.pop("param_dtype", "bf16") == "bf16":
        done.values["bf16"] = True
    betas = rest.pop("adam_betas", None)
    if betas:
        done.values |= {"adam_beta1": float(betas[0]), "adam_beta2": float(betas[1])}
    if rest.pop("flash_attn", False):
        done.values["attn_implementation"] = "flash_attention_2"
    for key, kind in (("save_steps", "save"), ("eval_steps", "eval")):
        steps = _number(rest, key, -1)
        if kind == "eval" and not rest.get("eval_dataset"):
            continue
        done.values |= (
            {f"{kind}_strategy": "steps", f"{kind}_steps": int(steps)} if steps > 0 else {f"{kind}_strategy": "no"}
        )
    for key in ("chosen_key", "rejected_key", "prompt_key"):
        value = rest.pop(key, None)
        if value not in (None, key.removesuffix("_key")):
            done.lose(key, value, _COLUMNS)
    if not rest.pop("apply_chat_template", False):
        done.lose(
            "apply_chat_template",
            False,
            "conversations are read with the model's chat template, rows of strings as they are",
        )
    if rest.pop("use_wandb", None):
        done.values |= {"report_to": "wandb"}


def _openrlhf_sets(rest: Keys, done: Conversion) -> None:
    names = [name for name in str(rest.pop("dataset", "") or "").split(",") if name]
    shares = [float(share) for share in str(rest.pop("dataset_probs", "") or "").split(",") if share]
    entries: Sequence[Keys] = [{"name": name.removeprefix("json@")} for name in names]
    if len(shares) == len(names) > 1:
        entries = [{**entry, "weight": share} for entry, share in zip(entries, shares, strict=True)]
    if entries:
        done.add_sets(entries)
    split = rest.pop("dataset_split", "train")
    if split != "train":
        done.values["dataset_train_split"] = split


def _openrlhf_batch(rest: Keys, done: Conversion, gpus: int | None) -> None:
    """Pairs of a step over all GPUs, which are known to the launcher alone."""
    step, micro = int(_number(rest, "train_batch_size", 128)), int(_number(rest, "micro_train_batch_size", 1))
    done.values["per_device_train_batch_size"] = micro
    if gpus is None:
        done.lose(
            "train_batch_size",
            step,
            f"set `gradient_accumulation_steps` to {step} / ({micro} x GPUs), or say `--gpus N`",
        )
    elif step % (micro * gpus):
        done.lose("train_batch_size", step, f"is no multiple of {micro} pairs on each of {gpus} GPUs")
    else:
        done.values["gradient_accumulation_steps"] = step // (micro * gpus)


OPENRLHF = Trainer(
    title="OpenRLHF",
    marks=("pretrain", "micro_train_batch_size", "max_len"),
    program=r"openrlhf\.cli\.train_dpo|\S*train_dpo\.py",
    make=_openrlhf,
    renamed={
        "pretrain": "model_name_or_path",
        "ref_pretrain": "anchor",
        "save_path": "output_dir",
        "max_len": "max_length",
        "max_epochs": "num_train_epochs",
        "max_norm": "max_grad_norm",
        "l2": "weight_decay",
        "lr_warmup_ratio": "warmup_steps",
        "lr_scheduler": "lr_scheduler_type",
        "max_ckpt_num": "save_total_limit",
        "wandb_run_name": "run_name",
        "wandb_project": "project",
        "aux_loss_coef": "router_aux_loss_coef",
    },
    needless={
        "packing_samples": _PACKED,
        "load_checkpoint": "a run that is in the folder goes on",
        "disable_fast_tokenizer": _FAST,
        "input_template": _TEMPLATE,
        "ckpt_path": "checkpoints lie in `output_dir`",
        "multiturn": "conversations of several turns are read as they are",
        **dict.fromkeys(("wandb_org", "wandb_group"), _WANDB),
    },
    lost={
        **dict.fromkeys(
            ("adam_offload", "zpg", "overlap_comm", "grad_accum_dtype"),
            "a setting of a DeepSpeed file: `deepspeed: FILE`",
        ),
        **dict.fromkeys(
            ("ring_attn_size", "ring_head_stride", "ds_tensor_parallel_size"), "sequences are not split over GPUs"
        ),
        "eval_dataset": "name a split of the data with `dataset_test_split`",
        "max_samples": "write it as `subset` of each set of `dataset_name`",
        "kl_loss_coef": "no such term is added",
    },
)


def _ms_swift(rest: Keys, done: Conversion, gpus: int | None) -> None:
    choose("rlhf_type", rest.pop("rlhf_type", None), {"dpo": "dpo"}, "no recipe of preference pairs around a reference")
    for key in ("train_type", "tuner_type"):
        if (tuning := rest.pop(key, "full")) != "full":
            done.lose(key, tuning, "all weights train here, for which the learning rate is usually lower")
    names = rest.pop("dataset", None) or []
    parts = {}
    for name in [names] if isinstance(names, str) else names:
        name, _, count = str(name).partition("#")
        parts[name] = int(count) if count else None
    if parts:
        done.add_sets(sets_with_parts(parts))
    if attention := rest.pop("attn_impl", None):
        words = {
            "flash_attn": "flash_attention_2",
            "flash_attention_2": "flash_attention_2",
            "sdpa": "sdpa",
            "eager": "eager",
        }
        done.values["attn_implementation"] = choose("attn_impl", attention, words, "another attention")
    if (held := _number(rest, "split_dataset_ratio")) > 0:
        done.values["held_out"] = held
    elif "eval_steps" in rest:
        done.needless["eval_steps"] = "nothing is held out"
        rest.pop("eval_steps")
    for kind in ("eval", "save"):
        if f"{kind}_steps" in rest:
            done.values.setdefault(f"{kind}_strategy", rest.pop(f"{kind}_strategy", "steps"))
    _deepspeed(rest, done)


MS_SWIFT = Trainer(
    title="ms-swift",
    marks=("rlhf_type", "train_type", "tuner_type", "split_dataset_ratio"),
    program=r"(?:swift|megatron)\s+rlhf",
    make=_ms_swift,
    renamed={"model": "model_name_or_path", "ref_model": "anchor", "torch_dtype": "torch_dtype"},
    needless={
        "load_from_cache_file": _CACHED,
        "dataset_shuffle": "pairs are shuffled by `seed`",
        **dict.fromkeys(("model_type", "template"), _TEMPLATE),
        **dict.fromkeys(("model_author", "model_name"), "of no use here"),
    },
    lost={
        "val_dataset": "name a split of the data with `dataset_test_split`",
        "system": "write a `system` column",
        "sequence_parallel_size": "sequences are not split over GPUs",
        **dict.fromkeys(("freeze_vit", "freeze_aligner", "freeze_llm"), "text alone is trained"),
    },
)

TRAINERS: dict[str, Trainer] = {
    "axolotl": AXOLOTL,
    "llama_factory": LLAMA_FACTORY,
    "open_instruct": OPEN_INSTRUCT,
    "openrlhf": OPENRLHF,
    "ms_swift": MS_SWIFT,
}
