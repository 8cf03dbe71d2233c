"""`mrpo convert`: other trainers' DPO examples in this project's keys; nothing of them is dropped without a word."""

import json
import re

import pytest
import yaml

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import run_command
from mrpo_scale.commands.convert import convert, read_foreign
from mrpo_scale.commands.train import run
from tests.recipes import foreign
from tests.recipes.local import command_line, made_local
from tests.tiny import write_models

#: (file, its text, some of what it becomes, keys that are not carried)
CASES = {
    "axolotl lora": (
        "a.yml",
        foreign.AXOLOTL,
        {
            "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "dataset_name": "fozziethebeat/alpaca_messages_2k_dpo_test",
            "loss_type": "sigmoid",
            "held_out": 0.05,
            "max_length": 4096,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 4,
            "optim": "adamw_bnb_8bit",
            "lr_scheduler_type": "cosine",
            "eval_strategy": "steps",
            "eval_steps": 0.0625,
            "save_steps": 0.25,
            "attn_implementation": "flash_attention_2",
            "warmup_steps": 10,
            "use_peft": True,
            "lora_r": 32,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "lora_target_modules": ["all-linear"],
        },
        ["load_in_8bit", "datasets: field_messages"],
    ),
    "axolotl qlora": (
        "a.yml",
        foreign.AXOLOTL_QLORA,
        {
            "beta": 0.1,
            "dataset_name": "mlabonne/orpo-dpo-mix-40k",
            "deepspeed": "zero2",
            "optim": "paged_adamw_32bit",
            "use_peft": True,
            "load_in_4bit": True,
            "lora_r": 32,
            "lora_alpha": 16,
        },
        [],
    ),
    "LLaMA-Factory lora": (
        "l.yaml",
        foreign.LLAMA_FACTORY,
        {
            "beta": 0.1,
            "loss_type": "sigmoid",
            "max_length": 2048,
            "dataset_num_proc": 16,
            "warmup_steps": 0.1,
            "use_peft": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_modules": ["all-linear"],
        },
        ["dataset", "max_samples"],
    ),
    "LLaMA-Factory full": (
        "l.yaml",
        foreign.LLAMA_FACTORY_FULL,
        {
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.5, 0.5, 0.25],
            "held_out": 0.1,
            "deepspeed": "zero3",
            "attn_implementation": "flash_attention_2",
        },
        ["pref_bco_weight"],
    ),
    "open-instruct": (
        "o.yaml",
        foreign.OPEN_INSTRUCT,
        {
            "loss_type": "sigmoid_norm",
            "beta": 5.0,
            "dataset_name": "allenai/olmo-2-1124-13b-preference-mix",
            "max_length": 2048,
            "warmup_steps": 0.1,
            "save_strategy": "steps",
            "save_steps": 1000,
            "report_to": ["wandb"],
        },
        ["add_bos", "clip_grad_norm"],
    ),
    "open-instruct's mix": (
        "o.yaml",
        foreign.OPEN_INSTRUCT_MIX,
        {
            "dataset_name": [
                {"name": "allenai/ultrafeedback_binarized_cleaned_train"},
                {"name": "ai2-adapt-dev/DaringAnteater-prefs-RM-filter", "subset": 0.5},
                {"name": "ai2-adapt-dev/WildChat-prefs-280824", "subset": 1000},
            ],
            "loss_type": "sigmoid_norm",
        },
        ["clip_grad_norm"],
    ),
    "open-instruct's command": (
        "o.sh",
        foreign.OPEN_INSTRUCT_COMMAND,
        {
            "model_name_or_path": "allenai/OLMo-2-0425-1B-SFT",
            "learning_rate": 2.5e-6,
            "run_name": "my_dpo",
            "dataset_name": [
                {"name": "allenai/olmo-2-0425-1b-preference-mix"},
                {"name": "VGraf/general_responses_dev_8maxturns", "subset": 2247},
            ],
            "report_to": "wandb",
            "beta": 5.0,
        },
        ["gradient_accumulation_steps", "add_bos", "chat_template_name", "clip_grad_norm"],
    ),
    "OpenRLHF's command": (
        "r.sh",
        foreign.OPENRLHF_COMMAND,
        {
            "output_dir": "./checkpoint/llama3-8b-dpo",
            "save_strategy": "no",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 32,
            "deepspeed": "zero3",
            "warmup_steps": 0.03,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 0.1],
            "adam_beta2": 0.98,
            "dataset_name": [{"name": "OpenRLHF/a", "weight": 0.8}, {"name": "OpenRLHF/b", "weight": 0.2}],
            "gradient_checkpointing": True,
        },
        ["rejected_key", "zpg"],
    ),
    "ms-swift's command": (
        "s.sh",
        foreign.MS_SWIFT_COMMAND,
        {
            "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
            "held_out": 0.01,
            "dtype": "bfloat16",
            "eval_strategy": "steps",
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 0.1],
            "attn_implementation": "flash_attention_2",
            "deepspeed": "zero3",
        },
        [],
    ),
    "ms-swift's MPO": (
        "s.sh",
        foreign.MS_SWIFT_MPO_COMMAND,
        {
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.8, 0.2, 1.0],
            "dataset_name": [{"name": "swift/RLAIF-V-Dataset", "subset": 20000}],
        },
        ["gradient_accumulation_steps", "freeze_vit"],
    ),
}
#: Keys that become others, so that their names stand nowhere after.
MADE = {
    *(
        "rl",
        "datasets",
        "flash_attention",
        "evals_per_epoch",
        "saves_per_epoch",
        "wandb_project",
        "deepspeed",
        "val_set_size",
    ),
    *("stage", "pref_loss", "pref_ftx", "pref_bco_weight", "finetuning_type", "dataset", "val_size", "flash_attn"),
    *("dpo_loss_type", "dpo_beta", "dpo_label_smoothing", "dataset_mixer", "dataset_mixer_list", "use_flash_attn"),
    *(
        "checkpointing_steps",
        "with_tracking",
        "tokenizer_name",
        "tokenizer_name_or_path",
        "nll_loss_coef",
        "dataset_probs",
    ),
    *(
        "zero_stage",
        "bf16",
        "adam_betas",
        "eval_steps",
        "save_steps",
        "chosen_key",
        "rejected_key",
        "apply_chat_template",
    ),
    *("train_batch_size", "micro_train_batch_size", "rlhf_type", "train_type", "attn_impl", "split_dataset_ratio"),
    *("rpo_alpha", "warmup_ratio", "torch_dtype", "padding_free", "overwrite_output_dir", "preprocessing_num_workers"),
    *("group_by_length", "adapter", "use_lora", "lora_target_linear", "finetuning_type", "lora_rank", "lora_target"),
}


def converted(tmp_path, capsys, name, *flags):
    file, text, _, _ = CASES[name]
    (tmp_path / file).write_text(text)
    capsys.readouterr()  # what DeepSpeed says when a model is made
    assert convert([str(tmp_path / file), "--gpus", "8", *flags]) == 0
    printed = capsys.readouterr()
    return yaml.safe_load(printed.out), printed


def not_carried(err):
    part = err.partition("NOT CARRIED:")[2]
    return re.findall(r"^  `((?:datasets: )?\w+)[:`]", part, re.MULTILINE)


@pytest.mark.parametrize("name", CASES)
def test_an_example_of_another_trainer(name, tmp_path, capsys):
    recipe, printed = converted(tmp_path, capsys, name)
    _, _, expected, lost = CASES[name]
    assert {key: recipe.get(key) for key in expected} == expected
    assert sorted(not_carried(printed.err)) == sorted(lost)
    assert recipe["ref_models"] == [], "the line to fill in"
    for key in lost:
        assert f"`{key}: " in printed.out, "in the file too"


@pytest.mark.parametrize("name", CASES)
def test_no_key_is_dropped_without_a_word(name, tmp_path, capsys):
    recipe, printed = converted(tmp_path, capsys, name)
    trainer, given, unresolved = read_foreign(tmp_path / CASES[name][0])
    named = {*recipe, *unresolved, *re.findall(r"^  `?([\w]+)", printed.err, re.MULTILINE), *MADE}
    assert not [key for key in given if key not in named and trainer.renamed.get(key) not in recipe]


def test_an_unknown_key_is_listed(tmp_path, capsys):
    file = tmp_path / "l.yaml"
    file.write_text(foreign.LLAMA_FACTORY_FULL + "brand_new_key: 3\nuse_liger_kernel: true\nlr_scheduler_type: rex\n")
    convert([str(file), "--output", str(tmp_path / "out.yaml")])
    said = capsys.readouterr().err
    assert {"brand_new_key", "use_liger_kernel", "lr_scheduler_type"} <= set(not_carried(said))
    assert "rex" in said and "choose from" in said
    assert "brand_new_key" not in yaml.safe_load((tmp_path / "out.yaml").read_text())


def test_a_loss_that_is_not_named_is_not_guessed(tmp_path, capsys):
    """open-instruct's default was dpo with beta 0.1, and is dpo_norm with beta 5."""
    file = tmp_path / "o.yaml"
    file.write_text(foreign.OPEN_INSTRUCT.replace("dpo_loss_type: dpo_norm\ndpo_beta: 5\n", ""))
    convert([str(file)])
    printed = capsys.readouterr()
    assert {"dpo_loss_type", "dpo_beta"} <= set(not_carried(printed.err))
    assert not {"loss_type", "beta"} & set(yaml.safe_load(printed.out[printed.out.index("# Converted") :]))


REFUSED = {
    "axolotl's KTO": ("a.yml", foreign.AXOLOTL.replace("rl: dpo", "rl: kto"), ["`rl: kto`", "dpo, ipo"]),
    "LLaMA-Factory's SFT": ("l.yaml", foreign.LLAMA_FACTORY.replace("stage: dpo", "stage: sft"), ["`stage: sft`"]),
    "LLaMA-Factory's SimPO": (
        "l.yaml",
        foreign.LLAMA_FACTORY.replace("loss: sigmoid", "loss: simpo"),
        ["simpo", "no reference"],
    ),
    "open-instruct's WPO": (
        "o.yaml",
        foreign.OPEN_INSTRUCT.replace("dpo_norm", "wpo"),
        ["`dpo_loss_type: wpo`", "dpo_norm"],
    ),
    "nobody's": ("n.yaml", "learning_rate: 1\n", ["no key of axolotl", "--from"]),
    "no DPO": ("n.sh", "python train.py --lr 1\n", ["starts no DPO training"]),
    "open quotes": ("s.sh", "swift rlhf --rlhf_type dpo --model 'a\n", ["quotes"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_recipe_of_pairs(name, tmp_path):
    file, text, words = REFUSED[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError) as error:
        convert([str(tmp_path / file)])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"no.yaml cannot be read"):
        convert([str(tmp_path / "no.yaml")])
    for flags in (["--from", "trlx"], ["--gpus", "0"], ["--outptu", "x"]):
        with pytest.raises(SystemExit) as stop:
            run_command("convert", [str(tmp_path / "x.yaml"), *flags])
        assert stop.value.code == 2 and capsys.readouterr().err.count("error: ") == 1
    (tmp_path / "there.yaml").write_text("beta: 1\n")
    (tmp_path / "a.yml").write_text(foreign.AXOLOTL)
    with pytest.raises(ConfigError, match="is there already"):
        convert([str(tmp_path / "a.yml"), "--output", str(tmp_path / "there.yaml")])


@pytest.mark.parametrize("name", ["open-instruct's mix", "LLaMA-Factory full"])
def test_two_steps_of_a_converted_recipe(name, tmp_path, capsys):
    folders = write_models(tmp_path / "models")
    recipe, _ = converted(tmp_path, capsys, name)
    recipe.setdefault("dataset_name", "the/set")  # LLaMA-Factory's names are in a file of its own
    without = ("ref_models", "deepspeed", "save_steps", "dataset_num_proc")
    local = made_local({key: value for key, value in recipe.items() if key not in without}, tmp_path, folders["llama"])
    for one in local["dataset_name"] if isinstance(local["dataset_name"], list) else ():
        if one.get("subset") == 1000:
            one["subset"] = 10
    run(command_line(local, [folders["qwen2"]], tmp_path / "recipe.yaml"))
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert log["global_step"] == 2
