"""MRPOTrainer from Python, in one process: the call of the README, the anchor, plain DPO, saving, resuming."""

import importlib
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError, TrainingError
from mrpo_scale.training.metrics import metric_names
from tests.tiny import pair_dataset, write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def config(tmp_path, **keys):
    return MRPOConfig(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **keys,
        }
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_loaded_model_and_names_are_the_same_run(folders, tmp_path):
    """A loaded policy's starting weights become the anchor, from a file of their own, not from the weights that train."""
    rows = pair_dataset(12)
    by_name = MRPOTrainer(folders["llama"], [folders["qwen2"]], config(tmp_path / "name"), rows, pair_dataset(5, 1))
    by_name.train()
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    loaded = MRPOTrainer(
        model=model,
        ref_models=[folders["qwen2"]],
        args=config(tmp_path / "loaded"),
        train_dataset=rows,
        eval_dataset={"one": pair_dataset(5, 1), "two": pair_dataset(3, 2)},
        processing_class=tokenizer,
    )
    loaded.train()
    assert losses(loaded) == losses(by_name)
    anchor = load_file(tmp_path / "loaded" / "anchor" / "model.safetensors")
    source = load_file(Path(folders["llama"]) / "model.safetensors")
    assert all(torch.equal(anchor[key], source[key]) for key in source)
    metrics = loaded.evaluate()
    assert metrics["eval_one_rewards/margins"] == pytest.approx(by_name.evaluate()["eval_rewards/margins"], rel=1e-6)
    assert "eval_two_anchor/rewards/accuracies" in metrics
    named = {f"eval_two_{name}" for name in metric_names(loaded.args.build_objective(), loaded.plan.names)}
    assert named <= {key for key in metrics if key.startswith("eval_two")}, "what `metric_for_best_model` may be"


def test_without_references_it_is_dpo(folders, tmp_path):
    """K=1: the loss at step 0 is log 2, whatever the objective, and mrpo and dpo take the same steps."""
    rows = pair_dataset(12)
    mrpo = MRPOTrainer(folders["llama"], args=config(tmp_path / "mrpo"), train_dataset=rows)
    dpo = MRPOTrainer(folders["llama"], args=config(tmp_path / "dpo", objective="dpo"), train_dataset=rows)
    mrpo.train()
    dpo.train()
    assert losses(mrpo)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(mrpo) == losses(dpo)
    assert losses(mrpo)[-1] != losses(mrpo)[0]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"objective": "multi_dpo", "label_smoothing": 0.1},
        {"loss_type": "ipo", "ref_weights": [0.2, 0.8]},
        {"loss_type": "hinge", "aggregate": "min", "clip": "fixed"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["ipo", "sigmoid_norm", "apo_down"]},
    ],
    ids=["mrpo", "multi_dpo", "ipo", "hinge", "mpo", "per_token"],
)
def test_both_ways_through_the_head_are_one_run(folders, tmp_path, keys):
    """Gradients made in the forward and logits recomputed in the backward: the same losses and gradient norms."""
    logs = []
    for head_backward in ("in_forward", "recompute"):
        args = config(tmp_path, head_backward=head_backward, gradient_accumulation_steps=2, **keys)
        trainer = MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(18))
        trainer.train()
        logs.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    for got, expected in zip(*logs, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


def counted(monkeypatch, module, *names):
    """{name: calls} of functions of a module, wherever they were imported; they run as ever."""
    calls = Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return count

    for name in names:
        function = getattr(importlib.import_module(module), name)
        for user in list(sys.modules.values()):
            if vars(user).get(name) is function:
                monkeypatch.setattr(user, name, counting(name, function))
    return calls


@pytest.mark.parametrize(("head_backward", "objective"), [("in_forward", "mrpo"), ("recompute", "multi_dpo")])
def test_a_step_forms_the_virtual_reference_once(folders, tmp_path, monkeypatch, head_backward, objective):
    """K=3 over 2 micro-batches and several chunks of the head: by the fused call where all references are live, from log-probs
    where all or some come from the cache. Held-out pairs once and for all. Whichever way, the losses are the same bits."""
    # A chunk of some 20 tokens, where a micro-batch of 4 pairs has about 80.
    one_pass = importlib.import_module("mrpo_kernels.linear_preference_loss")
    monkeypatch.setitem(one_pass._CHUNK_BYTES, "cpu", 4 * 300 * 20)
    aggregated = counted(monkeypatch, "mrpo_kernels.virtual_reference", "aggregate_logps")
    entered = counted(monkeypatch, "mrpo_kernels.fused_reference", "virtual_reference", "combine_logps")
    held_to = counted(monkeypatch, "mrpo_scale.objective", "loss_against")
    keys = {"gradient_accumulation_steps": 2, "max_steps": 3, "head_backward": head_backward, "objective": objective}
    cache = {"ref_cache_dir": str(tmp_path / "cache")}
    rows, others = (pair_dataset(24), pair_dataset(5, 1)), [folders["qwen2"], folders["gpt_neox"]]
    MRPOTrainer(folders["llama"], others[:1], config(tmp_path, ref_scoring="precompute", **cache), *rows)  # K=2
    ways = {"live": {}, "mixed": cache, "cached": {**cache, "ref_scoring": "precompute"}}
    logs = {}
    for way, options in ways.items():
        trainer = MRPOTrainer(folders["llama"], others, config(tmp_path, **keys, **options), *rows)
        assert trainer.scores.live == {"live": [0, 1, 2], "mixed": [2], "cached": []}[way]
        for counter in (aggregated, entered, held_to):
            counter.clear()
        trainer.train()
        once = {"virtual_reference" if way == "live" else "combine_logps": 3}
        assert (aggregated, entered) == ({"aggregate_logps": 3}, once), way
        assert held_to["loss_against"] == 6 if head_backward == "recompute" else held_to["loss_against"] > 20
        assert [trainer.evaluate()["eval_loss"] for _ in range(2)] and aggregated["aggregate_logps"] == 4
        logs[way] = losses(trainer)
    assert logs["live"] == logs["mixed"] == logs["cached"]


def test_bf16_on_a_cpu_trains(folders, tmp_path):
    """accelerate's autocast rounds inside the forward and returns float32, which the self-check took for a wrong forward."""
    logs = []
    for bf16 in (True, False):
        args = config(tmp_path, bf16=bf16, max_steps=1)
        trainer = MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(12))
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=0.02) and logs[0][key] != logs[1][key], key


def test_a_foreign_anchor(folders, tmp_path):
    trainer = MRPOTrainer(
        folders["llama"],
        args=config(tmp_path, anchor=folders["gpt_neox"], objective="dpo"),
        train_dataset=pair_dataset(8),
    )
    trainer.train()
    assert trainer.scores.references[0].model.config.model_type == "gpt_neox"
    assert losses(trainer)[0] != pytest.approx(math.log(2), rel=1e-3)


def test_metrics_by_hand(folders, tmp_path):
    """Held-out metrics equal a computation with plain forwards of every model on its own text."""
    rows = pair_dataset(5, seed=1)
    args = config(tmp_path, learning_rate=0.0, max_steps=1)
    trainer = MRPOTrainer(folders["llama"], [folders["gpt_neox"]], args, pair_dataset(8), rows)
    trainer.train()
    metrics = trainer.evaluate()
    logps = []
    for name, template in (("llama", None), ("gpt_neox", "Human: {}\n\nAssistant: ")):
        model = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
        tok = AutoTokenizer.from_pretrained(folders[name])
        for row in rows:
            if template is None:
                prompt = tok.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            else:
                prompt = template.format(row["prompt"][0]["content"])
            end = "<|im_end|>" if template is None else "</s>"
            start = tok(prompt, add_special_tokens=False).input_ids
            for side in ("chosen", "rejected"):
                response = tok(row[side][0]["content"] + end, add_special_tokens=False).input_ids
                with torch.no_grad():
                    logits = model(torch.tensor([start + response])).logits[0].double().log_softmax(-1)
                at = torch.arange(len(response)) + len(start) - 1
                logps.append(logits[at, torch.tensor(response)].sum())
    policy_P2, other_P2 = torch.stack(logps).view(2, 5, 2)
    margins_P = 0.1 * ((policy_P2 - other_P2)[:, 0] - (policy_P2 - other_P2)[:, 1])
    assert metrics["eval_logps/chosen"] == pytest.approx(policy_P2[:, 0].mean().item(), rel=1e-5)
    assert metrics["eval_logps/rejected"] == pytest.approx(policy_P2[:, 1].mean().item(), rel=1e-5)
    assert metrics["eval_anchor/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert metrics["eval_references/gpt_neox/rewards/margins"] == pytest.approx(margins_P.mean().item(), rel=1e-4)
    assert metrics["eval_references/gpt_neox/rewards/accuracies"] == pytest.approx(
        (margins_P > 0).double().mean().item()
    )


def test_what_is_saved_has_the_sources_dtype(folders, tmp_path):
    """A bf16 source is trained in float32 on this CPU and saved as bf16 again, ties and names kept."""
    source = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(folders["qwen2"]).save_pretrained(source)
    trainer = MRPOTrainer(str(source), args=config(tmp_path / "run"), train_dataset=pair_dataset(8))
    assert trainer.policy.dtype == torch.float32
    trainer.train()
    trainer.save_model()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_resume_continues_where_it_stopped(folders, tmp_path, bf16):
    rows = pair_dataset(18)
    keys = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 1, "bf16": bf16}
    whole = MRPOTrainer(folders["llama"], [folders["qwen2"]], config(tmp_path / "whole", **keys), rows)
    whole.train()
    again = MRPOTrainer(folders["llama"], [folders["qwen2"]], config(tmp_path / "again", **keys), rows)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[name]), name
        assert tensor.dtype == torch.float32


def test_dropout_is_off_unless_asked_for(folders, tmp_path):
    trainer = MRPOTrainer(folders["gpt_neox"], args=config(tmp_path), train_dataset=pair_dataset(8))
    assert all(m.p == 0 for m in trainer.policy.modules() if isinstance(m, torch.nn.Dropout))


def write_opt(folder, tokenizer_of):
    """An OPT with dropout: its layers keep the probabilities as numbers, `dropout` and `layerdrop` among them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": tokenizer.pad_token_id}
    dropouts = {"dropout": 0.2, "attention_dropout": 0.2, "layerdrop": 0.1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes, **dropouts))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_no_kind_of_dropout_trains_and_all_of_it_is_saved(folders, tmp_path):
    """Without dropout the loss of step 0 is log 2, the policy being its reference. What is saved keeps its config."""
    model = write_opt(tmp_path / "opt", folders["llama"])
    args = config(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = MRPOTrainer(model, [], args, pair_dataset(12))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "saved"):
        saved = json.loads((folder / "config.json").read_text())
        assert [saved[key] for key in ("dropout", "attention_dropout", "layerdrop")] == [0.2, 0.2, 0.1]


@pytest.mark.parametrize("first", ["train", "evaluate"])
def test_a_policy_that_trains_with_noise_stops_before_the_first_step(folders, tmp_path, first):
    class NoisySilu(torch.nn.SiLU):
        def forward(self, x):
            return super().forward(x) * (1 + 0.3 * torch.randn_like(x) if self.training else 1)

    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.model.layers[0].mlp.act_fn = NoisySilu()
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    trainer = MRPOTrainer(model, [], config(tmp_path), pair_dataset(12), pair_dataset(4, 1), processing_class=tokenizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"policy \(LlamaForCausalLM\): its log-probs in train mode differ"):
        getattr(trainer, first)()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_what_python_can_get_wrong(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with pytest.raises(ConfigError, match="processing_class"):
        MRPOTrainer(model, args=config(tmp_path), train_dataset=pair_dataset(8))
    with pytest.raises(ConfigError, match="no rows"):
        MRPOTrainer(folders["llama"], args=config(tmp_path), train_dataset=pair_dataset(8).select([]))


class Hub:
    """The hub's client at the place where the Trainer calls it; keeps what it was given to upload."""

    def __init__(self, kept):
        self.kept = kept

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, ignore_patterns, **kwargs):
        shutil.copytree(folder_path, self.kept, ignore=shutil.ignore_patterns(*ignore_patterns))


def test_a_push_uploads_our_card_and_the_model_in_its_sources_dtype(folders, tmp_path, monkeypatch):
    """The Trainer's own push: it saves once more, drafts a card of its own over README.md, then uploads. The token stays here."""
    source = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(source)
    kept = tmp_path / "uploaded"
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: Hub(kept))
    keys = {
        "push_to_hub": True,
        "hub_model_id": "mine",
        "hub_token": "hf_secret",
        "ref_cache_dir": str(tmp_path / "cache"),
    }
    args = config(tmp_path / "run", save_strategy="steps", hub_strategy="end", **keys)
    trainer = MRPOTrainer(str(source), [folders["qwen2"]], args, pair_dataset(8), pair_dataset(4, 1))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = (kept / "README.md").read_text()
    assert "preference-optimized" in card and "beta" in card and "generated from Trainer" not in card
    for store in trainer.scores.stores:
        assert store.identity.key in card
    assert {t.dtype for t in load_file(kept / "model.safetensors").values()} == {torch.bfloat16}
    assert (kept / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for name in ("curves.png", "report.html", "run.json", "trainer_state.json"):
        assert (kept / name).stat().st_size > 0
    # The hub's client obeys a .gitignore in the folder.
    assert {"training_args.bin", "bad_rows_*.jsonl", "ref_cache/"} <= set((kept / ".gitignore").read_text().split())
    everything = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(everything) > 10
    for file in everything:
        assert b"hf_secret" not in file.read_bytes(), file
    for name in ("README.md", "report.html", "run.json"):
        assert str(tmp_path) not in (kept / name).read_text(), name


def test_a_card_from_python(folders, tmp_path):
    """Without a recipe: what the trainer knows, and what the caller says of the data."""
    trainer = MRPOTrainer(folders["llama"], [folders["qwen2"]], config(tmp_path, beta=0.25), pair_dataset(8))
    trainer.train()
    trainer.create_model_card(dataset="org/pairs", license="apache-2.0")
    card = (tmp_path / "README.md").read_text()
    assert "datasets:\n- org/pairs" in card and "license: apache-2.0" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["beta"] == 0.25 and recipe["learning_rate"] == 1e-3
    assert "output_dir" not in recipe and "bf16" not in recipe, "only what was typed, and no places"
    assert "report.html" in {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"gradient_checkpointing": True}, id="gradient_checkpointing"),
        pytest.param({"attn_implementation": "reference_spans"}, id="one_call_per_layer"),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="torch_compile", marks=pytest.mark.slow
        ),
    ],
)
def test_options_for_memory_and_speed_do_not_change_the_run(folders, tmp_path, keys):
    logs = []
    for options in ({}, keys):
        args = config(tmp_path, max_steps=2, **options)
        trainer = MRPOTrainer(folders["llama"], args=args, train_dataset=pair_dataset(8))
        trainer.train()
        logs.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    assert len(logs[0]) == 2
    for got, expected in zip(*logs, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


def test_an_evaluation_set_may_be_called_anything(folders, tmp_path):
    """`train` takes nobody's place, and a name is no path."""
    evals = {"train": pair_dataset(5, 1), "weights_split": pair_dataset(3, 2), "../org/set": pair_dataset(2, 3)}
    args = config(tmp_path / "run", max_steps=-1, num_train_epochs=1)
    trainer = MRPOTrainer(folders["llama"], args=args, train_dataset=pair_dataset(24), eval_dataset=evals)
    trainer.train()
    assert trainer.state.global_step == 6, "24 rows in windows of 4"
    metrics = trainer.evaluate()
    assert {f"eval_{name}_loss" for name in evals} <= metrics.keys()
    sizes = {name: len(pairs) for name, pairs in trainer.pair_sets.items()}
    assert sizes == {"train": 24, "eval_train": 5, "eval_weights_split": 3, "eval_../org/set": 2}
    files = {path.name for path in (tmp_path / "run").glob("*.npz")}
    assert files == {f"eval_{name}_logps.npz" for name in ("train", "weights_split", "..%2Forg%2Fset")}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for name in ("", 3, "x" * 101):
        with pytest.raises(ConfigError, match=r"`eval_dataset`: .* cannot name a set"):
            MRPOTrainer(folders["llama"], [], config(tmp_path / "run"), pair_dataset(8), {name: pair_dataset(3, 1)})


COMMON = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize("loaded", [False, True], ids=["by-name", "loaded"])
def test_a_generation_config_that_transformers_refuses_stops_no_save(folders, tmp_path, loaded):
    """Temperature without sampling is published often; refused, the weights of a whole training were lost."""
    source = tmp_path / "source"
    shutil.copytree(folders["llama"], source)
    (source / "generation_config.json").write_text(json.dumps(COMMON))
    args = config(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    model, tok = str(source), None
    if loaded:
        model, tok = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        model.generation_config.top_k = 7  # changed since it was loaded
    trainer = MRPOTrainer(model, [], args, pair_dataset(8), processing_class=tok)
    trainer.train()
    trainer.save_model()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "run/checkpoint-2/model.safetensors").is_file()
    saved = json.loads((tmp_path / "run/generation_config.json").read_text())
    assert COMMON.items() <= saved.items() and saved.get("top_k") == (7 if loaded else None)
    assert trainer.policy.generation_config.temperature == 0.6, "the model is as it was"


def test_what_a_save_refuses_is_said_before_the_first_step(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    tok = AutoTokenizer.from_pretrained(folders["llama"])
    trainer = MRPOTrainer(model, [], config(tmp_path), pair_dataset(8), processing_class=tok)
    trainer.policy.config.note = {1, 2}  # no JSON
    with pytest.raises(ConfigError, match=r"a save of the trained model would fail: .*set.*repair"):
        trainer.train()
    assert trainer.state.global_step == 0 and not losses(trainer)
    assert not list(tmp_path.glob(".rehearsal*"))


def test_a_source_that_is_gone_at_the_end_stops_no_save(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders["qwen2"], source)
    trainer = MRPOTrainer(str(source), [], config(tmp_path / "run"), pair_dataset(8))
    trainer.train()
    shutil.rmtree(source)
    trainer.save_model()
    assert (tmp_path / "run/config.json").read_bytes() == (Path(folders["qwen2"]) / "config.json").read_bytes()
    assert load_file(tmp_path / "run/model.safetensors").keys()


def test_weights_that_an_engine_keeps_to_itself_are_missed(folders, tmp_path):
    """The Trainer passes an empty state where DeepSpeed gathers nothing, warns, and ends well."""
    trainer = MRPOTrainer(folders["llama"], [], config(tmp_path), pair_dataset(8))
    with pytest.raises(TrainingError, match="gives no whole weights to save"):
        trainer._save(str(tmp_path / "out"), state_dict={})


def test_compute_metrics_gets_log_probs_and_may_choose_the_best_step(folders, tmp_path):
    seen = []

    def of_mine(predicted):
        seen.append((predicted.predictions, predicted.label_ids))
        return {"mine": np.float32(len(seen)), "eval_yours": 2}

    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "mine", "greater_is_better": False}
    trainer = MRPOTrainer(
        folders["llama"],
        [folders["qwen2"]],
        config(tmp_path, **keys),
        pair_dataset(12),
        pair_dataset(5, 1),
        compute_metrics=of_mine,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3, "the first evaluation was the best, and two more were none better"
    assert trainer.state.best_global_step == 1
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_mine"] for entry in logged] == [1, 2, 3] and logged[0]["eval_yours"] == 2
    predictions, references = seen[0]
    assert predictions.shape == (5, 2) and references.shape == (5, 2, 2)
    assert predictions.mean(0).tolist() == pytest.approx(
        [logged[0]["eval_logps/chosen"], logged[0]["eval_logps/rejected"]], rel=1e-6
    )
    with pytest.raises(ConfigError, match=r"`metric_for_best_model: nothing` was not measured; there are .*eval_loss"):
        wrong = config(tmp_path / "wrong", **{**keys, "metric_for_best_model": "nothing"})
        MRPOTrainer(folders["llama"], [], wrong, pair_dataset(12), pair_dataset(5, 1), compute_metrics=of_mine).train()


def test_other_rows_are_evaluated_and_predicted(folders, tmp_path):
    """Raw rows: scored as the run's own are, in their order; log and files of the run stay its own."""
    rows = pair_dataset(7, 2)
    args = config(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2)
    trainer = MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(12), pair_dataset(5, 1))
    trainer.train()
    own, log = (tmp_path / "eval_logps.npz").read_bytes(), list(trainer.state.log_history)
    metrics = trainer.evaluate(rows)
    several = trainer.evaluate({"one": rows, "two": pair_dataset(3, 3)})
    predicted = trainer.predict(rows)
    assert (tmp_path / "eval_logps.npz").read_bytes() == own and trainer.state.log_history == log
    assert metrics["eval_loss"] == several["eval_one_loss"] == predicted.metrics["test_loss"] != log[-2]["eval_loss"]
    assert predicted.predictions.shape == (7, 2) and predicted.label_ids.shape == (7, 2, 2)
    # In their order: the same rows turned round give the same log-probs turned round.
    again = trainer.predict(rows.select(range(6, -1, -1)))
    np.testing.assert_allclose(again.predictions[::-1], predicted.predictions, rtol=1e-5)
    np.testing.assert_allclose(again.label_ids[::-1], predicted.label_ids, rtol=1e-5)
    margins_N = 0.1 * np.diff(predicted.predictions - predicted.label_ids[:, 0])[:, 0] * -1
    assert predicted.metrics["test_anchor/rewards/margins"] == pytest.approx(margins_N.mean(), rel=1e-4)
    # Held-out pairs as the run's own set, and a trainer made for them: the same numbers.
    other = MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(12), rows)
    assert other.evaluate()["eval_logps/chosen"] != metrics["eval_logps/chosen"], "that one is not trained"
    with pytest.raises(ConfigError, match="no set of this name"):
        trainer.evaluate("two")
    with pytest.raises(ConfigError, match=r"there are no held-out pairs to evaluate on; pass rows"):
        MRPOTrainer(folders["llama"], [], config(tmp_path / "none"), pair_dataset(12)).evaluate()


def test_other_rows_are_read_from_the_cache_or_refused(folders, tmp_path):
    args = config(tmp_path, ref_cache_dir=str(tmp_path / "cache"))
    made = [MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(12), pair_dataset(5, 1))]
    made[0].train()
    made[0].evaluate()
    rows = pair_dataset(7, 2)
    live = made[0].predict(rows)
    cached = MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(12), pair_dataset(5, 1))
    assert not cached.scores.live, "the cache has all of the run's own"
    assert np.array_equal(cached.predict(rows).label_ids, live.label_ids)
    with pytest.raises(ConfigError, match=r"of 9 rows .* anchor 9, qwen2 9; .* Pass the rows as `eval_dataset`"):
        cached.evaluate(pair_dataset(9, 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_collator", list),
        ("compute_loss_func", max),
        ("preprocess_logits_for_metrics", max),
        ("model_init", max),
        ("optimizers", (torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], 1e-3), None)),
    ],
)
def test_what_the_trainer_would_ignore_is_refused(folders, tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"^`{name}`[^\n]*$"):
        MRPOTrainer(folders["llama"], [], config(tmp_path), pair_dataset(8), **{name: value})


@pytest.mark.parametrize(
    "keys", [{"batch_eval_metrics": True}, {"include_for_metrics": ["inputs"]}, {"ignore_data_skip": True}]
)
def test_keys_that_would_do_nothing_or_harm_are_refused(tmp_path, keys):
    with pytest.raises(ConfigError, match=f"`{next(iter(keys))}: "):
        config(tmp_path, **keys)


def test_optimizers_from_python_train_the_policy(folders, tmp_path):
    def weights(**keys):
        trainer = MRPOTrainer(args=config(tmp_path), train_dataset=pair_dataset(8), **keys)
        trainer.train()
        return trainer.policy.state_dict()

    sgd = {"lr": 0.5}
    named = weights(model=folders["llama"], optimizer_cls_and_kwargs=(torch.optim.SGD, sgd))
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    tok = AutoTokenizer.from_pretrained(folders["llama"])
    made = weights(model=model, processing_class=tok, optimizers=(torch.optim.SGD(model.parameters(), **sgd), None))
    adam = weights(model=folders["llama"])
    assert all(torch.equal(named[name], made[name]) for name in named)
    assert any(not torch.equal(named[name], adam[name]) for name in named)


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("auto", False)])
def test_updates_that_are_rounded_away_are_said(folders, tmp_path, caplog, dtype, said):
    args = config(tmp_path, dtype=dtype, learning_rate=5e-7)
    trainer = MRPOTrainer(folders["llama"], [], args, pair_dataset(8))
    before = {name: tensor.clone() for name, tensor in trainer.policy.named_parameters()}
    trainer.train()
    moved = sum(int((before[name] != tensor).sum()) for name, tensor in trainer.policy.named_parameters())
    total = sum(tensor.numel() for tensor in before.values())
    assert (moved < total / 100) == said
    lines = [record.getMessage() for record in caplog.records if "most updates are smaller" in record.getMessage()]
    assert len(lines) == said
    assert not said or f"updates {total:,} of {total:,} weights in bfloat16 itself" in lines[0]


def test_tokens_that_the_policy_sees_are_counted(folders, tmp_path):
    """`non_padding`: every pair once, whatever the batches; `all`: what is computed, padding and fillers included."""
    counts = {}
    for kind, sizes in (("all", (4,)), ("non_padding", (4, 2))):
        for size in sizes:
            keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
            args = config(tmp_path, include_num_input_tokens_seen=kind, max_steps=-1, num_train_epochs=1, **keys)
            trainer = MRPOTrainer(folders["llama"], [], args, pair_dataset(11))
            trainer.train()
            counts[kind, size] = trainer.state.num_input_tokens_seen
            assert trainer.state.log_history[0]["num_input_tokens_seen"] > 0
    tokens = int(trainer.pair_sets["train"].lengths[:, 0].sum())  # shared prompt: each once
    assert counts["non_padding", 4] == counts["non_padding", 2] == tokens < counts["all", 4]
    assert config(tmp_path, include_num_input_tokens_seen=True).include_num_input_tokens_seen == "all"


def test_a_set_that_fills_no_step_is_refused_before_weights_load(folders, tmp_path, monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mrpo_scale.training.prepare.load_policy", loads)
    monkeypatch.setattr("mrpo_scale.references.loading.load_reference", loads)
    args = config(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match=r"`dataloader_drop_last: true` leaves no step to train: 15 pairs .* of 16"):
        MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(15))
