"""The DPO keys of open-instruct, OpenRLHF and ms-swift, mostly of command lines: what each is here, or why it is not carried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mrpo_scale.config.foreign import (
    CACHED,
    COLUMNS,
    FAST,
    NO_REFERENCE,
    OF_DATA,
    OWN_SERVICE,
    PACKED,
    TEMPLATE,
    TOKENIZER,
    WANDB,
    Conversion,
    Keys,
    Trainer,
    choose,
    sets_with_parts,
    take_adapter,
    take_deepspeed,
    take_number,
)


def _open_instruct(rest: Keys, done: Conversion, gpus: int | None) -> None:
    kinds = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}
    named = rest.pop("dpo_loss_type", None) or rest.pop("loss_type", None)
    if named is not None:
        done.losses(
            choose("dpo_loss_type", named, kinds, NO_REFERENCE if named == "simpo" else "no loss of this project"), {}
        )
    if (beta := take_number(rest, "dpo_beta", take_number(rest, "beta"))) > 0:
        done.values["beta"] = beta
    for key, given, here in (("dpo_loss_type", named, "loss_type"), ("dpo_beta", beta, "beta")):
        if not given:  # its default has changed, and nothing says of which version a recipe is
            done.lose(
                key,
                "not given",
                f"open-instruct's default was dpo with beta 0.1, later dpo_norm with beta 5; write `{here}`",
            )
    done.values["label_smoothing"] = take_number(rest, "dpo_label_smoothing")
    _open_instruct_sets(rest, done)
    asked = [key for key in ("use_lora", "use_qlora") if rest.pop(key, False)]
    take_adapter(rest, done, bool(asked))
    done.values |= {"load_in_4bit": True} if "use_qlora" in asked else {}
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
    if (clip := take_number(rest, "clip_grad_norm", -1)) > 0:
        done.values["max_grad_norm"] = clip
    else:
        done.lose(
            "clip_grad_norm",
            "not given",
            "open-instruct leaves it to its DeepSpeed file; here `max_grad_norm` is 1 unless set",
        )


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
        "max_train_steps": "max_steps",
        "dataset_config_name": "dataset_config",
        "train_file": "dataset_name",
    },
    needless={
        "use_slow_tokenizer": FAST,
        "concatenated_forward": "each pair is one forward over its prompt and both responses",
        "dataset_skip_cache": CACHED,
        "dataset_local_cache_dir": CACHED,
        "cache_dataset_only": CACHED,
        "packing": PACKED,
        "reference_logprobs_cache_path": "`ref_cache_dir` keeps reference scores",
        **dict.fromkeys(("try_launch_beaker_eval_jobs", "hf_metadata_dataset", "gs_bucket_path"), OWN_SERVICE),
        **dict.fromkeys(("oe_eval_*", "eval_*", "beaker_*", "add_seed_and_date_to_exp_name"), OWN_SERVICE),
        "wandb_*": WANDB,
    },
    lost={
        "add_bos": "the chat template decides whether a text begins with it",
        "chat_template_name": TEMPLATE,
        "dpo_use_paged_optimizer": "write `optim: paged_adamw_32bit`",
        "tokenizer_revision": TOKENIZER,
        "load_balancing_loss": "no auxiliary loss is added",
    },
)


def _openrlhf(rest: Keys, done: Conversion, gpus: int | None) -> None:
    for key in [key for key in rest if "." in key]:  # from 0.10 on: --model.beta, --data.dataset, ...
        rest.setdefault(key.rpartition(".")[2], rest.pop(key))
    # Its IPO is of whole responses: it does not divide by tokens.
    done.losses("ipo_whole" if rest.pop("ipo", False) else "sigmoid", {"sft": take_number(rest, "nll_loss_coef")})
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
        steps = take_number(rest, key, -1)
        if kind == "eval" and not rest.get("eval_dataset"):
            continue
        done.values |= (
            {f"{kind}_strategy": "steps", f"{kind}_steps": int(steps)} if steps > 0 else {f"{kind}_strategy": "no"}
        )
    for key in ("chosen_key", "rejected_key", "prompt_key"):
        value = rest.pop(key, None)
        if value not in (None, key.removesuffix("_key")):
            done.lose(key, value, COLUMNS)
    if not rest.pop("apply_chat_template", False):
        done.lose(
            "apply_chat_template",
            False,
            "conversations are read with the model's chat template, rows of strings as they are",
        )
    take_adapter(rest, done, float(rest.get("lora_rank") or 0) > 0)
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
    step, micro = int(take_number(rest, "train_batch_size", 128)), int(take_number(rest, "micro_train_batch_size", 1))
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
        "packing_samples": PACKED,
        "load_checkpoint": "a run that is in the folder goes on",
        "disable_fast_tokenizer": FAST,
        "input_template": TEMPLATE,
        "ckpt_path": "checkpoints lie in `output_dir`",
        "multiturn": "conversations of several turns are read as they are",
        **dict.fromkeys(("wandb_org", "wandb_group"), WANDB),
    },
    lost={
        **dict.fromkeys(
            ("adam_offload", "zpg", "overlap_comm", "grad_accum_dtype"),
            "a setting of a DeepSpeed file: `deepspeed: FILE`",
        ),
        **dict.fromkeys(
            ("ring_attn_size", "ring_head_stride"),
            "`sequence_parallel_size` splits sequences, and heads with them",
        ),
        "ds_tensor_parallel_size": "weights are sharded by ZeRO-3 alone",
        **OF_DATA,
        "kl_loss_coef": "no such term is added",
    },
)


def _ms_swift(rest: Keys, done: Conversion, gpus: int | None) -> None:
    choose("rlhf_type", rest.pop("rlhf_type", None), {"dpo": "dpo"}, "no recipe of preference pairs around a reference")
    tuning = next((rest.pop(key) for key in ("train_type", "tuner_type") if key in rest), "lora")  # its default
    if tuning not in ("full", "lora"):
        done.lose("tuner_type", tuning, "all weights train here, or a LoRA adapter")
    take_adapter(rest, done, tuning == "lora")
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
    if (held := take_number(rest, "split_dataset_ratio")) > 0:
        done.values["held_out"] = held
    elif "eval_steps" in rest:
        done.needless["eval_steps"] = "nothing is held out"
        rest.pop("eval_steps")
    for kind in ("eval", "save"):
        if f"{kind}_steps" in rest:
            done.values.setdefault(f"{kind}_strategy", rest.pop(f"{kind}_strategy", "steps"))
    take_deepspeed(rest, done)


MS_SWIFT = Trainer(
    title="ms-swift",
    marks=("rlhf_type", "train_type", "tuner_type", "split_dataset_ratio"),
    program=r"(?:swift|megatron)\s+rlhf",
    make=_ms_swift,
    renamed={"model": "model_name_or_path", "ref_model": "anchor", "torch_dtype": "torch_dtype"},
    needless={
        "load_from_cache_file": CACHED,
        "dataset_shuffle": "pairs are shuffled by `seed`",
        **dict.fromkeys(("model_type", "template"), TEMPLATE),
        **dict.fromkeys(("model_author", "model_name"), "of no use here"),
    },
    lost={
        "val_dataset": "name a split of the data with `dataset_test_split`",
        "system": "write a `system` column",
        **dict.fromkeys(("freeze_vit", "freeze_aligner", "freeze_llm"), "text alone is trained"),
    },
)
