"""A folder that does not hold the whole policy is refused before anything loads, whatever the anchor, and by `mrpo check` too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import mrpo_scale.references.live
import mrpo_scale.training.prepare
from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import train_main
from mrpo_scale.models.plan import load_policy
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.planner.command import check
from tests.tiny import pair_dataset, pair_rows, tokenizer, write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(12)))
    return str(file)


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def edit_config(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def reward_model(folder):
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)


def shards_of_which_one_is_not_listed(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    gone = listing["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    listing["weight_map"] = {key: file for key, file in listing["weight_map"].items() if file != gone}
    index.write_text(json.dumps(listing))


BROKEN = {
    "a reward model": (reward_model, ["misses lm_head.weight and has unknown score.weight"]),
    "a layer's tensor is gone": (
        lambda folder: edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        ["misses model.layers.1.mlp.up_proj.weight"],
    ),
    "a shard is not listed": (shards_of_which_one_is_not_listed, ["misses model.layers.1.", "Get the model again"]),
    "another size": (
        lambda folder: edit_config(folder, intermediate_size=64),
        ["gate_proj.weight is [48, 32] in the checkpoint but [64, 32]"],
    ),
    "a layer too few in the config": (
        lambda folder: edit_config(folder, num_hidden_layers=1),
        ["has unknown model.layers.1.", "and 6 more"],
    ),
    "tied by its config alone": (
        lambda folder: edit_config(folder, tie_word_embeddings=True),
        ["ties", "two different tensors", "tie_word_embeddings: false"],
    ),
    "untied without a head": (
        lambda folder: edit_weights(folder, lambda w: w.pop("lm_head.weight")),
        ["misses lm_head.weight"],
    ),
    "a head of another task beside its own": (
        lambda folder: edit_weights(folder, lambda w: w.update({"value_head.weight": torch.zeros(1, 32)})),
        ["has unknown value_head.weight"],
    ),
}


@pytest.fixture(params=BROKEN, ids=lambda name: name.replace(" ", "-"))
def broken(request, folders, tmp_path):
    """(a policy's folder, what is said of it)."""
    change, said = BROKEN[request.param]
    folder = tmp_path / "policy"
    shutil.copytree(folders["llama"], folder)
    change(folder)
    return str(folder), said


def test_it_is_refused_whatever_the_anchor_is(broken, folders, data, tmp_path, monkeypatch, capsys):
    """With an anchor of its own nothing else looks at the policy's folder, and a random head would be trained."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(mrpo_scale.training.prepare, "load_policy", fail)
    monkeypatch.setattr(mrpo_scale.references.live, "ShardedReference", fail)
    folder, said = broken
    words = ["--model_name_or_path", folder, "--dataset_name", data, "--output_dir", str(tmp_path / "run")]
    for anchor in ([], ["--anchor", folders["qwen2"]]):
        with pytest.raises(SystemExit) as stop:
            train_main([*words, *anchor, "--use_cpu", "true"])
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and all(word in errors[0] for word in ("policy: ", *said)), errors


def test_the_check_refuses_it_too(broken, folders, data, tmp_path, capsys):
    folder, said = broken
    words = ["--model_name_or_path", folder, "--anchor", folders["qwen2"], "--dataset_name", data]
    assert check([*words, "--output", str(tmp_path / "check"), "--gpu", "cpu", "--gpus", "1"]) == 2
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in ("policy: ", *said)), errors


def test_loading_refuses_it_too(broken):
    """What is downloaded is there only then."""
    folder, said = broken
    with pytest.raises(ConfigError) as refused:
        load_policy(ReferenceSource("policy", folder))
    assert all(word in str(refused.value) for word in said)


# -------------------------------------------------------------------------------------------- what the policy's class lacks


@pytest.fixture(scope="module")
def ctrl(tmp_path_factory):
    """CTRL has no activation checkpointing."""
    folder = tmp_path_factory.mktemp("ctrl")
    tok = tokenizer(None, 300)
    sizes = {"vocab_size": len(tok), "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("ctrl", **sizes)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


LACKS = "`gradient_checkpointing: true` (the default) does not work for the policy: CTRLLMHeadModel"


@pytest.mark.parametrize("loaded", [False, True], ids=["by name", "loaded"])
def test_activation_checkpointing_that_a_model_lacks(ctrl, tmp_path, loaded):
    args = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "max_steps": 1}
    model = AutoModelForCausalLM.from_pretrained(ctrl) if loaded else ctrl
    keys = {"processing_class": AutoTokenizer.from_pretrained(ctrl)} if loaded else {}
    with pytest.raises(ConfigError, match=LACKS.replace("(", r"\(").replace(")", r"\)")):
        MRPOTrainer(model, args=MRPOConfig(**args), train_dataset=pair_dataset(4), **keys)
    assert not Path(tmp_path / "anchor").exists(), "it is found before the weights are written"
    args |= {"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True}
    trainer = MRPOTrainer(model, args=MRPOConfig(**args), train_dataset=pair_dataset(4), **keys)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_check_says_what_a_class_lacks(ctrl, data, tmp_path, capsys):
    words = ["--model_name_or_path", ctrl, "--dataset_name", data, "--output", str(tmp_path / "check")]
    assert check(words) == 2
    assert LACKS in capsys.readouterr().out
    check([*words, "--gradient_checkpointing", "false"])
    assert LACKS not in capsys.readouterr().out


def test_a_quantized_policy_is_refused(folders, data, tmp_path, capsys):
    folder = tmp_path / "policy"
    shutil.copytree(folders["llama"], folder)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    words = ["--model_name_or_path", str(folder), "--dataset_name", data, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train_main([*words, "--use_cpu", "true"])
    assert stop.value.code == 2
    assert f"error: policy: {folder} is quantized, and all weights of a policy are trained" in capsys.readouterr().err


def test_a_router_loss_of_a_dense_policy_is_refused(folders, data, tmp_path, capsys):
    words = ["--model_name_or_path", folders["llama"], "--dataset_name", data, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train_main([*words, "--router_aux_loss_coef", "0.01", "--use_cpu", "true"])
    assert stop.value.code == 2
    assert "error: `router_aux_loss_coef: 0.01` has no meaning for the policy" in capsys.readouterr().err
