"""References in 4 and 8 bits: the scores of bitsandbytes' own dequantized weights, live and cached, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.commands.inspect_references import inspect
from mrpo_scale.config.model_spec import parse_ref_models
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.planner.model_size import model_size
from mrpo_scale.references.low_bits import QuantizedLinear
from mrpo_scale.references.sharding import ShardedReference
from mrpo_scale.training.preflight import preflight_problems
from tests.tiny import pair_dataset, write_models
from tests.tools import require_module

require_module("bitsandbytes", "pip install bitsandbytes")
from bitsandbytes import functional  # noqa: E402

CPU = torch.device("cpu")
PAIRS = [PairTokens([5, 6, 7, 8], [9, 10, 11], [12, 13]), PairTokens([20] * 11, [4], [3, 2, 1, 60, 61])]
NAMES = ["llama", "qwen2", "gpt_neox"]  # the second ties its head to its embedding, the third's layers have biases


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), hidden_size=64, intermediate_size=128)


def load(folder, quantize="nf4", **options):
    return ShardedReference(ReferenceSource("ref", str(folder), quantize=quantize, **options), None, CPU)


def dequantized(weight, quantize):
    if quantize == "int8":
        int8, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(int8, scales).to(weight.dtype)
    nf4, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    return functional.dequantize_4bit(nf4, state)


@torch.no_grad()
def plain_scores(folder, quantize, dtype):
    """Of an ordinary model whose linear weights bitsandbytes has quantized and dequantized."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.copy_(dequantized(module.weight, quantize))
    enable_pair_scoring(model, "plain")
    return score_pairs(model, collate_pairs(PAIRS, shared_prompt=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_dequantized_weights(folders, name, quantize, dtype):
    reference = load(folders[name], quantize, dtype=dtype)
    got = reference.score(collate_pairs(PAIRS, shared_prompt=reference.shared_prompt))
    expected = plain_scores(folders[name], quantize, dtype)
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
    whole = load(folders[name], None, dtype=dtype)
    assert not torch.allclose(got, whole.score(whole.batch(PAIRS)), rtol=1e-3), "or nothing was quantized"


def test_a_pair_has_the_same_score_beside_any_other(folders):
    """Which bitsandbytes' own 8-bit products in eval mode do not promise."""
    for quantize in ("nf4", "int8"):
        reference = load(folders["llama"], quantize)
        together = reference.score(reference.batch(PAIRS))
        alone = torch.cat([reference.score(reference.batch([pair])) for pair in PAIRS])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_what_is_held(folders):
    """Half a byte and a scale for 64 weights of the linear layers; head, embedding and norms as they are."""
    whole, reference = load(folders["llama"], None), load(folders["llama"])
    layers = [module for module in reference.model.modules() if isinstance(module, QuantizedLinear)]
    count = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 2 * 7 and type(reference.model.get_output_embeddings()) is type(
        whole.model.get_output_embeddings()
    )
    assert reference.num_parameters == whole.num_parameters
    assert reference.bytes_per_rank == 4 * (whole.num_parameters - count) + count // 2 + 4 * count // 64
    planned = model_size(reference.source, itemsize=4, device_type="cpu")
    assert planned.held_bytes(1) == reference.bytes_per_rank
    assert not reference.mapped and whole.mapped
    assert all(layer.weight.shape == (layer.out_features, layer.in_features) for layer in layers)


def trainer(folders, output_dir, **keys):
    keys = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **keys}
    args = MRPOConfig(str(output_dir), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, **keys)
    refs = [{"model": folders["qwen2"], "quantize": "nf4"}, {"model": folders["gpt_neox"], "quantize": "int8"}]
    return MRPOTrainer(folders["llama"], refs, args, pair_dataset(10))


def test_a_run_that_reads_the_cache_is_the_live_one(folders, tmp_path, caplog):
    caplog.set_level("INFO")
    cache = str(tmp_path / "cache")
    losses = []
    for name, keys in {"live": {}, "cached": {"ref_cache_dir": cache, "ref_scoring": "precompute"}}.items():
        run = trainer(folders, tmp_path / name, **keys)
        assert run.scores.live == ([0, 1, 2] if name == "live" else [])
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert "(nf4)" in caplog.text and "(int8)" in caplog.text, "in the table of placements"
    parts = [json.loads(file.read_text())["parts"] for file in Path(cache).glob("*/reference.json")]
    assert sorted(str(part.get("quantize")) for part in parts) == ["None", "int8", "nf4"]


def test_inspect_says_what_was_quantized(folders, tmp_path, capsys):
    cache = {"ref_cache_dir": str(tmp_path / "cache"), "ref_scoring": "precompute"}
    trainer(folders, tmp_path / "out", **cache)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, pair_dataset(10))))
    recipe = {
        "model_name_or_path": folders["llama"],
        "ref_models": [
            {"model": folders["qwen2"], "quantize": "nf4"},
            {"model": folders["gpt_neox"], "quantize": "int8"},
        ],
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "ref_cache_dir": cache["ref_cache_dir"],
        "use_cpu": True,
        "report_to": "none",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    inspect(["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "found")])
    assert "qwen2: its linear layers were quantized to nf4." in capsys.readouterr().out
    found = json.loads((tmp_path / "found" / "inspect.json").read_text())
    assert found["quantized"] == {"qwen2": "nf4", "gpt_neox": "int8"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"quantize": "int4"}, ["`ref_models.quantize: int4`", "nf4", "int8"]),
        ({"quantize": 4}, ["`ref_models.quantize: 4` must be text"]),
        (
            {"quantize": "nf4", "url": "http://host/v1", "tokenizer": "T", "revision": "1"},
            ["`ref_models.quantize` is the server's to decide"],
        ),
    ],
)
def test_values(spec, words):
    with pytest.raises(ConfigError) as refused:
        parse_ref_models([{"model": "A", **spec}])
    assert all(word in str(refused.value) for word in words)


def problems(tmp_path, monkeypatch, world_size=1, **keys):
    config = MRPOConfig(str(tmp_path), use_cpu=True, report_to="none", **keys)
    with monkeypatch.context() as patch:
        patch.setattr(MRPOConfig, "world_size", world_size)
        found = preflight_problems(config, [{"model": "A", "quantize": "nf4"}])
    return [problem for problem in found if "nf4" in problem]


def test_refused_before_anything_loads(tmp_path, monkeypatch):
    assert problems(tmp_path, monkeypatch) == []
    assert problems(tmp_path, monkeypatch, world_size=2, ref_shard_size=1) == []
    for keys in ({}, {"ref_shard_size": 2}):
        assert problems(tmp_path, monkeypatch, world_size=2, **keys) == [
            "`quantize: nf4` of A on a shard group of 2 ranks: quantized weights are not sharded; set `ref_shard_size: 1`, or "
            "remove the key."
        ]
    (problem,) = problems(tmp_path, monkeypatch, ref_offload=True)
    assert "`ref_offload: true`" in problem and "\n" not in problem


def test_refused_without_bitsandbytes(tmp_path, monkeypatch):
    """Not under `follow`, where another job loads the reference."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    (problem,) = problems(tmp_path, monkeypatch)
    assert "bitsandbytes; `pip install 'mrpo-scale[peft]'`" in problem
    assert problems(tmp_path, monkeypatch, ref_scoring="follow", ref_cache_dir=str(tmp_path)) == []


def test_a_model_without_linear_layers_is_refused(tmp_path):
    """GPT-2's are transformers' Conv1D."""
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64, vocab_size=97)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="`quantize: nf4` of ref: GPT2LMHeadModel has no linear layers"):
        load(tmp_path)
