"""MRPOTrainer from Python, in one process: the call of the README, the anchor, plain DPO, saving, resuming."""

import importlib
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.errors import ConfigError
from mrpo_scale.evaluation import metric_names
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
    ],
    ids=["mrpo", "multi_dpo", "ipo", "hinge"],
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
    trainer = MRPOTrainer(
        folders["llama"], [folders["qwen2"]], config(tmp_path, bf16=True, max_steps=1), pair_dataset(12)
    )
    trainer.train()
    assert math.isfinite(losses(trainer)[0])


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


def test_resume_continues_where_it_stopped(folders, tmp_path):
    rows = pair_dataset(18)
    keys = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 1}
    whole = MRPOTrainer(folders["llama"], [folders["qwen2"]], config(tmp_path / "whole", **keys), rows)
    whole.train()
    again = MRPOTrainer(folders["llama"], [folders["qwen2"]], config(tmp_path / "again", **keys), rows)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[name]), name


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
