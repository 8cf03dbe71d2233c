"""The DPO keys of axolotl and LLaMA-Factory: what each is here, or why it is not carried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrpo_scale.config.foreign import (
    ANALYSED,
    CACHED,
    COLUMNS,
    CURVES,
    FAST,
    NO_REFERENCE,
    OF_DATA,
    PACKED,
    TEMPLATE,
    TOKENIZER,
    WANDB,
    Conversion,
    Keys,
    Trainer,
    choose,
    take_adapter,
    take_deepspeed,
    take_number,
)


def _times_per_epoch(rest: Keys, done: Conversion, key: str, kind: str) -> None:
    """`evals_per_epoch` and `saves_per_epoch`: below 1, `eval_steps` and `save_steps` are fractions of the run."""
    times, epochs = take_number(rest, key, -1), float(rest.get("num_epochs") or 1)
    if times == 0:
        done.values[f"{kind}_strategy"] = "no"
    elif times > 0:
        done.values |= {f"{kind}_strategy": "steps", f"{kind}_steps": round(1 / (times * epochs), 6)}


def _axolotl(rest: Keys, done: Conversion, gpus: int | None) -> None:
    kinds = {"dpo": "sigmoid", "ipo": "ipo"}
    kind = choose("rl", rest.pop("rl", None), kinds, "no recipe of preference pairs around a reference")
    done.losses(kind, {"sft": take_number(rest, "rpo_alpha")})
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
    held = take_number(rest, "val_set_size")
    if held:
        done.values["held_out"] = int(held) if held >= 1 else held
    elif rest.pop("evals_per_epoch", None):
        done.needless["evals_per_epoch"] = "nothing is held out"
    _times_per_epoch(rest, done, "evals_per_epoch", "eval")
    _times_per_epoch(rest, done, "saves_per_epoch", "save")
    on = rest.get("adapter") in ("lora", "qlora")
    take_adapter(rest, done, on)
    if on:
        rest.pop("adapter")
    if project := rest.pop("wandb_project", None):
        done.values |= {"report_to": "wandb", "project": project}
    take_deepspeed(rest, done)


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
            done.needless[f"datasets: {key}"] = ANALYSED
        elif value not in _AXOLOTL_COLUMNS.get(key, ()):
            done.lose(
                f"datasets: {key}", value, COLUMNS if key.startswith("field_") else "a key of axolotl's data sets"
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
        **dict.fromkeys(("tokenizer_type", "special_tokens", "tokens"), TOKENIZER),
        **dict.fromkeys(("chat_template", "default_system_message"), TEMPLATE),
        **dict.fromkeys(("dataset_prepared_path", "skip_prepare_dataset", "shuffle_merged_datasets"), CACHED),
        **dict.fromkeys(("sample_packing", "eval_sample_packing", "pad_to_sequence_len"), PACKED),
        **dict.fromkeys(("train_on_inputs", "dpo_use_logits_to_keep"), "responses alone are scored"),
        **dict.fromkeys(
            ("strict", "debug", "local_rank", "eval_table_size", "eval_table_max_new_tokens"), "of no use here"
        ),
        **dict.fromkeys(("wandb_entity", "wandb_watch", "wandb_log_model", "wandb_run_id"), WANDB),
    },
    lost={
        "lora_model_dir": "make a whole model of it first: `mrpo merge`",
        "adapter": "LoRA is the one adapter here",
        "test_datasets": "name their split `dataset_test_split`, or hold out with `held_out`",
        "early_stopping_patience": "from Python: `callbacks=[EarlyStoppingCallback(...)]`",
        "dataset_exact_deduplication": "duplicates are not removed; remove them from the data",
        "plugins": "axolotl's own",
    },
)


def _llama_factory(rest: Keys, done: Conversion, gpus: int | None) -> None:
    choose("stage", rest.pop("stage", None), {"dpo": "dpo"}, "no recipe of preference pairs")
    kinds = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
    kind = choose("pref_loss", rest.pop("pref_loss", "sigmoid"), kinds, NO_REFERENCE)
    bco, sft = take_number(rest, "pref_bco_weight"), take_number(rest, "pref_ftx")
    # Its mix is (loss + weight x bco) / (1 + weight) + ftx x sft.
    done.losses(kind, {"bco_pair": bco / (1 + bco), "sft": sft}, factor=1 / (1 + bco))
    if bco:
        done.lose(
            "pref_bco_weight", bco, "taken as `bco_pair`, which subtracts no running mean of rewards (docs/losses.md)"
        )
    tuning = rest.pop("finetuning_type", "lora")
    if tuning not in ("full", "lora"):
        done.lose("finetuning_type", tuning, "all weights train here, or a LoRA adapter")
    take_adapter(rest, done, tuning == "lora", alpha_per_rank=2)  # as it fills in what is not given
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
    if (held := take_number(rest, "val_size")) > 0:
        done.values["held_out"] = int(held) if held >= 1 else held
    take_deepspeed(rest, done)


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
        **dict.fromkeys(("template", "default_system"), TEMPLATE),
        **dict.fromkeys(("overwrite_cache", "tokenized_path", "cache_dir"), CACHED),
        **dict.fromkeys(("packing", "neat_packing"), PACKED),
        "plot_loss": CURVES,
        "use_fast_tokenizer": FAST,
    },
    lost={
        **dict.fromkeys(("dataset_dir", "media_dir"), "paths in `dataset_name` are enough"),
        **dict.fromkeys(
            ("freeze_vision_tower", "freeze_multi_modal_projector", "image_max_pixels"), "text alone is trained"
        ),
        **OF_DATA,
        "adapter_name_or_path": "make a whole model of it first: `mrpo merge`",
    },
)
