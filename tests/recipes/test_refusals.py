"""Contradictory and impossible settings that the keys of shared recipes make possible: by `mrpo train` and `mrpo check`, one line
and exit code 2 before any weights load."""

import json

import pytest
import yaml

import mrpo_scale.references.live
import mrpo_scale.training.prepare
from mrpo_scale.cli import run_command
from tests.recipes.local import HERE
from tests.tiny import pair_rows, write_models

ROWS = 12
#: {what is wrong: (keys of the recipe, words of the line)}. `SET` is a file of ROWS pairs; None takes a key out.
REFUSED = {
    "a supervised term twice": (
        {"rpo_alpha": 0.1, "loss_type": ["sigmoid", "sft"]},
        ["`rpo_alpha: 0.1`", "leave `sft`"],
    ),
    "a term of negative weight": ({"rpo_alpha": -1}, ["`rpo_alpha: -1`", "0 or more"]),
    "two losses, one weight": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        ["`loss_weights: [1.0]`", "for 2"],
    ),
    "no loss at all": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 0.0]}, ["loss_weights", "above 0"]),
    "a loss twice": ({"loss_type": ["sft", "sft"]}, ["`loss_type: sft sft`", "once"]),
    "a loss over the batch": ({"loss_type": "aot"}, ["`loss_type: aot`", "use `sigmoid`"]),
    "EXO without smoothing": ({"loss_type": "exo_pair"}, ["`label_smoothing: 0`", "exo_pair"]),
    "smoothing that a loss ignores": (
        {"loss_type": "apo_zero", "label_smoothing": 0.1},
        ["`label_smoothing: 0.1`", "apo_zero"],
    ),
    "more than half of the labels flipped": (
        {"loss_type": "robust", "label_smoothing": 0.6},
        ["`label_smoothing: 0.6`", "0.5"],
    ),
    "a temperature of zero": ({"loss_type": "discopop", "discopop_tau": 0}, ["`discopop_tau: 0.0`", "above 0"]),
    "a levelled loss of no virtual reference": (
        {"loss_type": "apo_zero", "objective": "multi_dpo"},
        ["apo_zero", "multi_dpo"],
    ),
    "HyPO of no virtual reference": (
        {"reference_margin": "nonnegative", "objective": "multi_dpo"},
        ["`reference_margin: nonnegative`", "multi_dpo"],
    ),
    "another divergence": ({"f_divergence_type": "js_divergence"}, ["f_divergence_type", "reverse KL"]),
    "two warmups": (
        {"warmup_ratio": 0.1, "warmup_steps": 5},
        ["`warmup_ratio` and `warmup_steps`", "leave `warmup_steps`"],
    ),
    "a warmup of five runs": ({"warmup_ratio": 5}, ["`warmup_ratio: 5`", "below 1"]),
    "sets twice": ({"dataset_mixer": {"SET": 1.0}}, ["`dataset_mixer` and `dataset_name`", "leave `dataset_name`"]),
    "a mixture of nothing": ({"dataset_name": None, "dataset_mixture": {"seed": 0}}, ["`dataset_mixture`", "list"]),
    "two training splits": ({"dataset_splits": ["train_a", "train_b"]}, ["`dataset_splits", "a `split` for each set"]),
    "held out twice": ({"test_split_size": 3, "held_out": 4}, ["`test_split_size` and `held_out`", "leave `held_out`"]),
    "all pairs held out": (
        {
            "dataset_name": None,
            "dataset_mixture": {"datasets": [{"id": "SET"}, {"id": "SET"}], "test_split_size": 2 * ROWS},
        },
        [f"`held_out: {2.0 * ROWS}`", f"below the {2 * ROWS} there are"],
    ),
    "more rows than there are": (
        {"dataset_name": [{"name": "SET", "subset": ROWS + 1}]},
        ["subset", f"below the {ROWS} there are"],
    ),
    "a column that is not there": (
        {"dataset_name": None, "datasets": [{"path": "SET", "columns": ["question"]}]},
        ["no column `question`", "there are"],
    ),
    "a split that is not there": ({"dataset_splits": ["train_prefs", "test_prefs"]}, ["train_prefs", "no such split"]),
    "weights of one set alone": ({"dataset_name": [{"name": "SET", "weight": 1}, {"name": "SET"}]}, ["no `weight`"]),
    "two dtypes": (
        {"model_init_kwargs": {"dtype": "float32"}, "dtype": "bfloat16"},
        ["`model_init_kwargs` and `dtype`"],
    ),
    "kernels of the hub": ({"model_init_kwargs": {"use_kernels": True}}, ["use_kernels", "remove it"]),
    "two ways to score": (
        {"precompute_ref_log_probs": True, "ref_scoring": "live"},
        ["`precompute_ref_log_probs`", "`ref_scoring`"],
    ),
    "two strategies": (
        {"evaluation_strategy": "steps", "eval_strategy": "no"},
        ["`evaluation_strategy` and `eval_strategy`", "leave `eval_strategy`"],
    ),
    "Liger": ({"use_liger_kernel": True}, ["`use_liger_kernel: True`", "remove the key"]),
    "an adapter's rank without one": ({"lora_r": 8}, ["`lora_r: 8`", "`use_peft: true`"]),
    "an adapter on the head": (
        {"use_peft": True, "lora_target_modules": ["lm_head"]},
        ["`lora_target_modules: ['lm_head']`", "head"],
    ),
    "an adapter on nothing": (
        {"use_peft": True, "lora_target_modules": ["attn"]},
        ["`lora_target_modules: ['attn']`", "name layers"],
    ),
    "4 bits of all weights": ({"load_in_4bit": True}, ["`load_in_4bit: True`", "`use_peft: true`"]),
    "4 bits and scores of whole weights": (
        {"use_peft": True, "lora_target_modules": ["all-linear"], "load_in_4bit": True, "ref_scoring": "precompute"},
        ["`load_in_4bit: true`", "unquantized"],
    ),
    "an evaluation on nothing": (
        {"evaluation_strategy": "steps", "eval_steps": 1},
        ["`eval_strategy: steps`", "`held_out`"],
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(ROWS)))
    return write_models(root), str(root / "pairs.jsonl")


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(mrpo_scale.training.prepare, "load_policy", fail)
    monkeypatch.setattr(mrpo_scale.references.live, "ShardedReference", fail)


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("name", REFUSED, ids=lambda name: name.replace(" ", "-"))
def test_a_setting_that_cannot_be(name, command, world, tmp_path, capsys, no_weights):
    folders, pairs = world
    keys, words = REFUSED[name]
    keys = json.loads(json.dumps(keys).replace("SET", pairs))
    recipe = {"model_name_or_path": folders["llama"], "ref_models": [folders["qwen2"]], "dataset_name": pairs, **HERE}
    recipe = {
        key: value
        for key, value in {**recipe, "output_dir": str(tmp_path / "run"), **keys}.items()
        if value is not None
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--gpus", "1", "--gpu", "cpu"] if command == "check" else []
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(command, ["--config", str(tmp_path / "r.yaml"), *flags])
    printed = capsys.readouterr()
    errors = [line for line in (printed.out + "\n" + printed.err).splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, errors
    assert all(word in errors[0] for word in words), errors[0]
    assert "did you mean" not in errors[0]


def test_there_are_twenty_of_them():
    assert len(REFUSED) >= 20
