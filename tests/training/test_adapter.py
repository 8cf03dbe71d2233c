"""LoRA: the adapter trains, the weights beside it do not, and the policy without it is the anchor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.commands.merge import merge
from tests.tiny import pair_dataset, write_models
from tests.tools import require_module

peft = require_module("peft", "pip install peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def trainer(folders, output_dir, policy="llama", refs=("qwen2", "gpt_neox"), **keys):
    keys = {
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **keys,
    }
    args = MRPOConfig(output_dir=str(output_dir), **keys)
    return MRPOTrainer(
        folders[policy], [folders[name] for name in refs], args, pair_dataset(18), pair_dataset(5, seed=1)
    )


def losses(run):
    return [(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry]


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folders, folder)
    before = {name: p.clone() for name, p in run.policy.get_base_model().named_parameters() if "lora" not in name}
    run.train()
    run.save_model()
    return folder, run, before


def test_only_the_adapter_trains(whole):
    _, run, before = whole
    after = dict(run.policy.get_base_model().named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)


def test_the_anchor_is_the_policy_without_it(folders, whole, tmp_path, caplog):
    """At step 0 bit for bit, for the adapter adds zeros; and the same run as with a second copy of the weights as the anchor."""
    caplog.set_level("INFO")
    _, run, _ = whole
    assert run.scores.live == [1, 2]
    first = run.state.log_history[0]
    assert first["anchor/rewards/margins"] == 0 and first["anchor/rewards/chosen"] == 0
    copied = trainer(folders, tmp_path, anchor=folders["llama"])
    copied.train()
    assert copied.scores.live == [0, 1, 2]
    torch.testing.assert_close(losses(copied), losses(run), rtol=1e-5, atol=1e-7)


def test_dpo_needs_no_reference_in_memory(folders, tmp_path):
    run = trainer(folders, tmp_path, refs=(), objective="dpo", eval_strategy="steps", eval_steps=2)
    run.train()
    assert run.scores.references == {} and losses(run)[0][0] == pytest.approx(0.693147, abs=1e-6)
    assert run.results["eval_loss"] > 0


def test_a_cache_is_of_the_weights_themselves(folders, whole, tmp_path):
    """Scores are kept of references as such; a run that reads them takes the same steps."""
    _, run, _ = whole
    cached = trainer(folders, tmp_path, ref_scoring="precompute")
    cached.train()
    torch.testing.assert_close(losses(cached), losses(run), rtol=1e-5, atol=1e-7)


def test_a_resumed_run_is_the_uninterrupted_one(folders, whole, tmp_path):
    _, run, _ = whole
    killed = trainer(folders, tmp_path)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(folders, tmp_path)
    resumed.train("auto")
    assert losses(resumed) == losses(run)
    for name, value in run.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], value), name
    with pytest.raises(ConfigError, match=r"`lora_r`: 16 there, 8 now"):
        trainer(folders, tmp_path, lora_r=8).train("auto")


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing": False},
        {"head_backward": "recompute"},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["kept activations", "recomputed head", "reentrant"],
)
def test_any_way_of_the_backward(folders, whole, tmp_path, keys):
    run = trainer(folders, tmp_path, **keys)
    run.train()
    torch.testing.assert_close(losses(run), losses(whole[1]), rtol=1e-5, atol=1e-7)


def test_gradients_are_the_chain_rule_on_full_finetuning(folders, tmp_path):
    """W + s B A: dL/dB = s dL/dW A^T and, where B is not zero, dL/dA = s B^T dL/dW."""
    adapted = trainer(
        folders, tmp_path / "a", lora_r=4, lora_alpha=8, learning_rate=0.0, max_steps=1, max_grad_norm=0.0
    )
    full = trainer(
        folders,
        tmp_path / "f",
        use_peft=False,
        lora_target_modules=None,
        learning_rate=0.0,
        max_steps=1,
        max_grad_norm=0.0,
    )
    layer = "model.layers.0.self_attn.q_proj"
    lora = adapted.policy.get_base_model().get_submodule(layer)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    with torch.no_grad():
        b.normal_(std=0.05)
        full.policy.get_submodule(layer).weight.add_(2 * b @ a)
    gradients = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    for run in (adapted, full):
        for name, module in run.policy.named_modules():  # the other adapters add nothing
            if "lora_B" in name and isinstance(module, torch.nn.Linear) and layer not in name:
                module.weight.data.zero_()
        run.add_callback(Look())
        run.train()
    whole = gradients[f"{layer}.weight"]
    prefix = f"base_model.model.{layer}"
    torch.testing.assert_close(gradients[f"{prefix}.lora_B.default.weight"], 2 * whole @ a.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[f"{prefix}.lora_A.default.weight"], 2 * b.T @ whole, rtol=1e-4, atol=1e-6)


def test_the_folder_is_pefts_and_can_be_merged(folders, whole, tmp_path):
    folder, run, _ = whole
    assert not list(Path(folder).glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    adapted = peft.PeftModel.from_pretrained(base, str(folder))
    ids = torch.arange(5, 25)[None]
    expected = run.policy(input_ids=ids).logits
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert merge([str(folder), "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    stored, source = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", Path(folders["llama"])))
    assert {k: v.dtype for k, v in stored.items()} == {k: v.dtype for k, v in source.items()}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (Path(folders["llama"]) / "config.json").read_bytes()


def test_an_adapter_is_no_model(folders, whole, tmp_path):
    folder = whole[0]
    with pytest.raises(ConfigError, match=r"mrpo merge .* --output"):
        trainer({**folders, "llama": str(folder)}, tmp_path)


REFUSED = [
    ({"lora_target_modules": ["q_proj", "lm_head"]}, r"lm_head.*output head"),
    ({"lora_modules_to_save": ["lm_head"]}, r"lora_modules_to_save.*output head"),
    ({"lora_target_modules": ["no_such_layer"]}, r"`lora_target_modules: \['no_such_layer'\]`.*not found"),
    ({"lora_dropout": 1.5}, r"`lora_dropout: 1.5` must be from 0 to below 1"),
    ({"lora_r": 0}, r"`lora_r: 0` must be at least 1"),
    ({"use_peft": False, "lora_r": 8}, r"`lora_r: 8` has no effect without `use_peft: true`"),
]


@pytest.mark.parametrize(
    ("keys", "why"), REFUSED, ids=[next(iter(keys)) + str(i) for i, (keys, _) in enumerate(REFUSED)]
)
def test_what_cannot_be_adapted(folders, tmp_path, keys, why):
    with pytest.raises(ConfigError, match=why):
        trainer(folders, tmp_path, **{"lora_target_modules": None, **keys} if not keys.get("use_peft", True) else keys)


def test_a_tied_head_is_not_adapted_through_the_embedding(folders, tmp_path):
    with pytest.raises(ConfigError, match="input embeddings, which are the output head"):
        trainer(folders, tmp_path, policy="qwen2", refs=(), lora_target_modules=["q_proj", "embed_tokens"])


def test_an_adapter_of_another_base(folders, whole, tmp_path):
    with pytest.raises(ConfigError, match="does not go into that model"):
        merge([str(whole[0]), "--base", folders["gpt_neox"], "--output", str(tmp_path / "x")])
    config = json.loads((Path(whole[0]) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folders["llama"]


def test_frozen_weights_in_four_bits(tmp_path):
    """The base stays as it was, and gradients reach every adapter, through layers that bitsandbytes has other kernels for in eval
    mode; the anchor is those same quantized weights."""
    require_module("bitsandbytes", "pip install bitsandbytes")
    folders = write_models(tmp_path / "models", hidden_size=64, intermediate_size=128)
    run = trainer(folders, tmp_path / "run", refs=("qwen2",), load_in_4bit=True)
    layers = [m for m in run.policy.modules() if type(m).__name__ == "Linear4bit" and "lora" not in type(m).__module__]
    assert len(layers) == 14 and all(m.weight.dtype == torch.uint8 for m in layers)
    before = [m.weight.clone() for m in layers]
    run.train()
    assert all(torch.equal(m.weight, old) for m, old in zip(layers, before, strict=True))
    moved = [p for name, p in run.policy.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and all(p.abs().max() > 0 for p in moved)
    first = run.state.log_history[0]
    assert first["anchor/rewards/margins"] == 0
    with pytest.raises(ConfigError, match=r"`load_in_4bit: true` with .*unquantized"):
        trainer(folders, tmp_path / "cached", load_in_4bit=True, ref_scoring="precompute")


def test_an_adapter_of_half_precision_weights_is_float32(folders, tmp_path):
    """In float16 Adam's epsilon is 0, and the second step divides by it."""
    run = trainer(folders, tmp_path, dtype="float16", max_steps=3)
    run.train()
    dtypes = {p.requires_grad: p.dtype for p in run.policy.parameters()}
    assert dtypes == {True: torch.float32, False: torch.float16}
    assert all(torch.isfinite(torch.tensor(loss)) for loss, _ in losses(run))
