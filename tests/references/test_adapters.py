"""K adapters on one base as K references: the scores of peft's own models and of merged ones, on weights that are held once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.commands.inspect_references import inspect
from mrpo_scale.commands.merge import merge
from mrpo_scale.config.model_spec import parse_ref_models
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.planner.command import check
from mrpo_scale.references.sharding import ShardedReference
from mrpo_scale.training.preflight import preflight_problems
from tests.tiny import pair_dataset, pair_rows, tokenizer, write_models
from tests.tools import require_module

peft = require_module("peft", "pip install peft")

CPU = torch.device("cpu")
PAIRS = [PairTokens([5, 6, 7, 8], [9, 10, 11], [12, 13]), PairTokens([20] * 11, [4], [3, 2, 1, 60, 61])]
#: Two that differ in rank, in scaling and in where they lie.
ADAPTERS = {
    "everywhere": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "somewhere": {"r": 8, "lora_alpha": 4, "use_rslora": True},
}
TARGETS = {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}


def write_adapter(base, folder, seed, **settings):
    """As a training would leave it: B is not zero."""
    torch.manual_seed(seed)
    model_type = AutoConfig.from_pretrained(base).model_type
    settings.setdefault("target_modules", TARGETS.get(model_type, ["q_proj", "v_proj"]))
    patterns = {} if settings["target_modules"] == "all-linear" else {settings["target_modules"][0]: 2}
    config = peft.LoraConfig(task_type="CAUSAL_LM", alpha_pattern=patterns, **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = write_models(root, hidden_size=64, intermediate_size=128)
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "gpt2")
    tokenizer(None, 300).save_pretrained(root / "gpt2")
    return {**folders, "gpt2": str(root / "gpt2")}


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """{base: {name: folder}}."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        base: {
            name: write_adapter(folders[base], root / base / name, seed, **settings)
            for seed, (name, settings) in enumerate(ADAPTERS.items())
        }
        for base in folders
    }


@pytest.fixture(scope="module")
def merged(adapters, tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    for name, folder in adapters["qwen2"].items():
        merge([folder, "--output", str(root / name)])
    return {name: str(root / name) for name in ADAPTERS}


def source(base, adapter=None, name="ref", **options):
    return ReferenceSource(
        name, str(base), adapter=None if adapter is None else ReferenceSource(name, adapter), **options
    )


def score(reference):
    return reference.score(reference.batch(PAIRS))


@torch.no_grad()
def pefts_scores(base, adapter, reference, dtype):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    choose_end_to_end(model, CPU, name="plain", asked=None, dtype=dtype)
    enable_pair_scoring(model, "plain")
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    layout = {"shared_prompt": reference.shared_prompt, "end_to_end": reference.end_to_end}
    return score_pairs(adapted, collate_pairs(PAIRS, **layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_scores_are_pefts_bit_for_bit(folders, adapters, base, dtype):
    """In any order, with a base that is a reference too and is switched to between them; no weight is held twice."""
    before = torch.get_rng_state()
    first = ShardedReference(source(folders[base], adapters[base]["everywhere"], dtype=dtype), None, CPU)
    second = first.sharing(source(folders[base], adapters[base]["somewhere"], dtype=dtype))
    plain = second.sharing(source(folders[base], dtype=dtype))
    assert torch.equal(torch.get_rng_state(), before)
    alone = ShardedReference(source(folders[base], dtype=dtype), None, CPU)
    for _ in range(2):
        assert torch.equal(score(first), pefts_scores(folders[base], adapters[base]["everywhere"], first, dtype))
        assert torch.equal(score(plain), score(alone))
        assert torch.equal(score(second), pefts_scores(folders[base], adapters[base]["somewhere"], second, dtype))
    assert not torch.allclose(score(first), score(plain), rtol=1e-3), "or the adapter does nothing"
    assert first.model is second.model is plain.model
    assert first.mapped == (dtype == torch.float32), "adapters leave the weights where the files are"
    tensors = [load_file(Path(adapters[base][name]) / "adapter_model.safetensors").values() for name in ADAPTERS]
    sizes = [4 * sum(tensor.numel() for tensor in some) for some in tensors]
    assert first.bytes_per_rank == alone.bytes_per_rank + sizes[0]
    assert (second.bytes_per_rank, plain.bytes_per_rank) == (sizes[1], 0)


def test_a_merged_model_says_the_same(folders, adapters, merged):
    reference = ShardedReference(source(folders["qwen2"]), None, CPU)
    for name, folder in adapters["qwen2"].items():
        whole = ShardedReference(source(merged[name]), None, CPU)
        torch.testing.assert_close(
            score(reference.sharing(source(folders["qwen2"], folder))), score(whole), rtol=1e-5, atol=1e-5
        )


def test_beside_a_quantized_base(folders, adapters):
    require_module("bitsandbytes", "pip install bitsandbytes")
    plain = ShardedReference(source(folders["llama"], quantize="nf4"), None, CPU)
    before = score(plain)
    adapted = plain.sharing(source(folders["llama"], adapters["llama"]["everywhere"], quantize="nf4"))
    alone = ShardedReference(source(folders["llama"], adapters["llama"]["everywhere"], quantize="nf4"), None, CPU)
    assert torch.equal(score(adapted), score(alone)) and torch.equal(score(plain), before)
    assert not torch.allclose(score(adapted), before, rtol=1e-3)
    assert alone.bytes_per_rank == plain.bytes_per_rank + adapted.bytes_per_rank


def references(folders, adapters):
    return [{"model": folders["qwen2"], "adapter": folder} for folder in adapters["qwen2"].values()]


def trainer(folders, refs, output_dir, **keys):
    keys = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **keys}
    keys = {"learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "seed": 3, **keys}
    args = MRPOConfig(str(output_dir), use_cpu=True, disable_tqdm=True, **keys)
    return MRPOTrainer(folders["llama"], refs, args, pair_dataset(14))


def losses(run):
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_a_run_of_adapters_is_the_run_of_merged_models(folders, adapters, merged, tmp_path, caplog):
    """Live, cached and read again; a changed adapter is scored anew, and nothing else is."""
    caplog.set_level("INFO")
    refs = [folders["qwen2"], *references(folders, adapters)]
    live = trainer(folders, refs, tmp_path / "live")
    assert live.scores.names == ["anchor", "qwen2", *ADAPTERS]
    of = [live.scores.references[k].model for k in range(4)]
    assert of[1].model is of[2].model is of[3].model is not of[0].model
    assert caplog.text.count("(weights of qwen2)") == 2 and "have the same weights" not in caplog.text
    expected = losses(live)
    whole = trainer(folders, [folders["qwen2"], *merged.values()], tmp_path / "whole")
    assert expected == pytest.approx(losses(whole), rel=1e-5)
    live.create_model_card()
    card = (tmp_path / "live" / "README.md").read_text()
    assert "adapter everywhere" in card and "all weights finetuned" in card

    cache = {"ref_cache_dir": str(tmp_path / "cache"), "ref_scoring": "precompute"}
    caplog.clear()
    assert losses(trainer(folders, refs, tmp_path / "cached", **cache)) == expected
    assert caplog.text.count("scored 14 rows") == 4 and caplog.text.count("qwen2 (qwen2") == 1, "its weights load once"
    copies = shutil.copytree(Path(adapters["qwen2"]["somewhere"]).parent, tmp_path / "copies")
    refs = [{"model": folders["qwen2"], "adapter": str(copies / name)} for name in ADAPTERS]
    file = copies / "somewhere" / "adapter_model.safetensors"
    save_file({key: 1.5 * value for key, value in load_file(file).items()}, file)
    caplog.clear()
    trainer(folders, refs, tmp_path / "changed", **cache)
    assert caplog.text.count("scored 14 rows") == 1 and "somewhere: scored 14 rows" in caplog.text
    config = copies / "everywhere" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 16, "inference_mode": False}))
    caplog.clear()
    trainer(folders, refs, tmp_path / "scaled", **cache)
    assert caplog.text.count("scored 14 rows") == 1 and "everywhere: scored 14 rows" in caplog.text


def test_what_cannot_share_says_so(folders, adapters, tmp_path, caplog):
    caplog.set_level("INFO")
    refs = [folders["qwen2"], {**references(folders, adapters)[0], "dtype": "bfloat16"}]
    trainer(folders, refs, tmp_path)
    assert f"qwen2 and everywhere are of one model, {folders['qwen2']}, but differ in dtype: its weights" in caplog.text


def test_check_and_inspect_know_what_is_held_once(folders, adapters, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, pair_rows(14))))
    recipe = {
        "model_name_or_path": folders["llama"],
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "use_cpu": True,
    }

    def held(refs, **keys):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "ref_models": refs, **keys}))
        status = check(["--config", str(tmp_path / "recipe.yaml"), "--gpu", "cpu", "--gpus", "2"])
        found = json.loads((tmp_path / "out" / "check" / "check.json").read_text())
        assert status == 0, found["errors"]
        return found["cost"]["estimates"][f"K={1 + len(refs)}, live"]["device_bytes"]["held"]["references"]

    refs = references(folders, adapters)
    one, three = held([folders["qwen2"]]), held([folders["qwen2"], *refs])
    assert "with an adapter, weights of qwen2" in capsys.readouterr().out
    small = sum(Path(f, "adapter_model.safetensors").stat().st_size for f in adapters["qwen2"].values())
    assert 0.8 * small < three - one < small
    assert held([folders["qwen2"], *refs], ref_placement="partition") < held([folders["qwen2"]] * 3)
    cached = {"ref_scoring": "precompute", "ref_cache_dir": str(tmp_path / "cache")}
    trainer(folders, refs, tmp_path / "scored", **cached, max_length=1024)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "ref_models": refs, **cached}))
    inspect(["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "found")])
    assert f"somewhere: the adapter {adapters['qwen2']['somewhere']} on {folders['qwen2']}." in capsys.readouterr().out


def changed(folder, config=None, tensors=None):
    """Rewrite an adapter's folder in place."""
    if config is not None:
        file = Path(folder) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if tensors is not None:
        file = Path(folder) / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "another base": (
        {"base_model_name_or_path": "org/other"},
        None,
        r"belongs to org/other, not to \S*qwen2; name that",
    ),
    "shapes": (
        None,
        lambda t: {**t, Q: t[Q][:, :5].contiguous()},
        r"does not fit \S*qwen2: of model.layers.0.*\[8, 5\]",
    ),
    "rank": ({"r": 2}, None, r"does not fit \S*qwen2"),
    "no such layer": (
        None,
        lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()},
        r"is not one of \S*qwen2, which has no layer model.layers.0.self_attn.query",
    ),
    "the head": (
        None,
        lambda t: {"base_model.model.lm_head.lora_A.weight": torch.ones(8, 64)},
        r"lies on lm_head, the output head, which .*`mrpo merge \S*somewhere --output FOLDER`",
    ),
    "embeddings": (
        None,
        lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(8, 9)},
        r"embed_tokens.lora_embedding_A, which is no LoRA of a linear layer; .*mrpo merge",
    ),
    "whole modules": ({"modules_to_save": ["lm_head"]}, None, r"`modules_to_save: \['lm_head'\]`.*mrpo merge"),
    "weights that it takes away": ({"init_lora_weights": "pissa"}, None, r"`init_lora_weights: pissa`.*mrpo merge"),
    "DoRA": ({"use_dora": True}, None, r"`use_dora: True`.*mrpo merge"),
    "what nobody knows": ({"use_new_thing": 1}, None, r"`use_new_thing: 1`.*mrpo merge"),
    "no LoRA": ({"peft_type": "IA3"}, None, r"`peft_type: IA3`"),
    "a pattern that takes for ever": (
        {"rank_pattern": {"(a+)+b": 3}},
        None,
        r"`rank_pattern` with the pattern `\(a\+\)\+b`",
    ),
    "a rank of text": ({"r": "8"}, None, r"`r: 8`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_reference(folders, adapters, tmp_path, case):
    """In one line, before weights load."""
    config, tensors, why = REFUSED[case]
    folder = shutil.copytree(adapters["qwen2"]["somewhere"], tmp_path / "somewhere")
    changed(folder, config, tensors)
    with pytest.raises(ConfigError, match=why) as error:
        trainer(folders, [{"model": folders["qwen2"], "adapter": str(folder)}], tmp_path / "out")
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(folders, adapters, tmp_path):
    folder = shutil.copytree(adapters["qwen2"]["somewhere"], tmp_path / "somewhere")
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    refs = [{"model": folders["qwen2"], "adapter": str(folder)}]
    with pytest.raises(
        ConfigError, match=r"no adapter_model.safetensors in .*adapter_model.bin, and pickles are not read"
    ):
        trainer(folders, refs, tmp_path / "out")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"is no adapter's folder: adapter_config.json.*holds adapter_config.json, which"
    ):
        trainer(folders, refs, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"`ref_models\.adapter` is the server's to decide"):
        parse_ref_models([{"model": "m", "adapter": "a", "url": "http://h/v1", "tokenizer": "t", "revision": "1"}])
    with pytest.raises(ConfigError, match=r"/none is no adapter's folder.*as peft and `mrpo train` write"):
        merge(["/none", "--output", str(tmp_path / "merged")])


def test_without_peft(tmp_path, monkeypatch):
    monkeypatch.setattr("mrpo_scale.models.adapter.importlib.util.find_spec", lambda name: None)
    config = MRPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    (problem,) = preflight_problems(config, [{"model": "base", "adapter": "a"}, {"model": "base", "adapter": "b"}])
    assert "`ref_models.adapter`" in problem and "pip install 'mrpo-scale[peft]'" in problem


def test_a_copy_of_its_base_is_its_base(folders, adapters, tmp_path):
    """By what the weights are, not by where they lie; a base that trained on is another."""
    copy = shutil.copytree(folders["qwen2"], tmp_path / "copy")
    ref = {"model": str(copy), "adapter": adapters["qwen2"]["somewhere"]}
    trainer(folders, [ref], tmp_path / "out")
    changed_weights = {k: v + 0.01 for k, v in load_file(copy / "model.safetensors").items()}
    save_file(changed_weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"belongs to {folders['qwen2']}, not to {copy}"):
        trainer(folders, [ref], tmp_path / "other")


def test_sources_that_share():
    one = source("base", "a", name="one")
    assert one.weights == source("base", name="two").weights
    assert one.weights != replace(one, dtype=torch.bfloat16).weights
