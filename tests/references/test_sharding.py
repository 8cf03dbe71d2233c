"""One reference on one rank: what is refused before weights load, and that streamed weights score as from_pretrained's do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import deepspeed

from mrpo_scale.base.errors import ConfigError, TrainingError
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.references.sharding import ReferenceSource, ShardedReference, check_source

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}),
}
PAIRS = [PairTokens([5, 6, 7, 8], [9, 10, 11], [12, 13]), PairTokens([20] * 11, [4], [3, 2, 1, 60, 61])]


def write_model(folder, kind="llama", **save):
    torch.manual_seed(0)
    model_type, options = MODELS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(folder, **save)
    return str(folder)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **options):
    return ShardedReference(ReferenceSource("ref", str(folder), **options), None, CPU)


@torch.no_grad()
def plain_scores(folder, pairs, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    enable_pair_scoring(model, "plain")
    return score_pairs(model, collate_pairs(pairs, shared_prompt=True))


@pytest.mark.parametrize("kind", MODELS)
def test_scores_as_from_pretrained(tmp_path, kind):
    reference = load(write_model(tmp_path, kind))
    got = reference.score(collate_pairs(PAIRS, shared_prompt=reference.shared_prompt))
    assert torch.equal(got, plain_scores(tmp_path, PAIRS, dtype=torch.float32))
    assert not got.requires_grad and not reference.model.training
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_bfloat16_scores_as_from_pretrained(tmp_path):
    reference = load(write_model(tmp_path, "gemma3_text"), dtype=torch.bfloat16)
    got = reference.score(collate_pairs(PAIRS, shared_prompt=True))
    assert got.dtype == torch.float32
    assert torch.equal(got, plain_scores(tmp_path, PAIRS, dtype=torch.bfloat16))
    assert reference.bytes_per_rank == 2 * reference.num_parameters


def test_index_of_several_files(tmp_path):
    reference = load(write_model(tmp_path, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    got = reference.score(collate_pairs(PAIRS, shared_prompt=True))
    assert torch.equal(got, plain_scores(tmp_path, PAIRS, dtype=torch.float32))


def test_a_file_that_is_written_to_is_noticed(tmp_path):
    """On a CPU the weights are the mapped file. A new file under its name leaves them what they are; another content does not."""
    reference = load(write_model(tmp_path))
    file = tmp_path / "model.safetensors"
    before = reference.score(collate_pairs(PAIRS, shared_prompt=True))
    (tmp_path / "other").write_bytes(b"\x7f" * file.stat().st_size)
    (tmp_path / "other").replace(file)
    assert torch.equal(reference.score(collate_pairs(PAIRS, shared_prompt=True)), before)

    reference = load(write_model(tmp_path))
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\x7f" * 8192)
    for score in (reference.score, reference.response_hidden):
        with pytest.raises(TrainingError, match=r"model\.safetensors was written to while its weights were in use"):
            score(collate_pairs(PAIRS, shared_prompt=True))


def test_converted_weights_do_not_depend_on_the_file(tmp_path):
    """Copies, which the table of placements must not call shared: the file may then change."""
    reference = load(write_model(tmp_path), dtype=torch.bfloat16)
    assert not reference.mapped and load(tmp_path).mapped
    before = reference.score(collate_pairs(PAIRS, shared_prompt=True))
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\x7f" * 8192)
    assert torch.equal(reference.score(collate_pairs(PAIRS, shared_prompt=True)), before)


def test_no_pairs(tmp_path):
    reference = load(write_model(tmp_path))
    assert reference.score(None).shape == (0, 2)
    assert reference.gathers == 1


def test_zero3_config_object_is_hidden_and_restored(tmp_path):
    folder = write_model(tmp_path)
    expected = plain_scores(folder, PAIRS, dtype=torch.float32)
    alive = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        reference = load(folder)
        assert deepspeed._hf_deepspeed_config_weak_ref() is alive
        with pytest.raises(ConfigError, match="attn_implementation"):
            load(folder, attn_implementation="no_such_attention")
        assert deepspeed._hf_deepspeed_config_weak_ref() is alive
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert torch.equal(reference.score(collate_pairs(PAIRS, shared_prompt=True)), expected)


# ------------------------------------------------------------------------------------------------- refused before loading


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigError, match=r"ref: .* holds no config.json"):
        check_source(ReferenceSource("ref", str(tmp_path)))


def test_unknown_hub_id_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError,
        match=r"no config.json could be read from `nobody/nothing` .* correct `model_name_or_path` or `ref_models`",
    ):
        check_source(ReferenceSource("ref", "nobody/nothing"))


def test_hub_snapshot_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / commit
    write_model(snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "v1").write_text(commit)
    reference = load("someone/tiny", revision="v1")
    expected = plain_scores(snapshot, PAIRS, dtype=torch.float32)
    assert torch.equal(reference.score(collate_pairs(PAIRS, shared_prompt=True)), expected)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="ref: no safetensors in"):
        check_source(ReferenceSource("ref", "someone/tiny", revision="v1"))


def test_pickled_weights_are_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"ref: no safetensors in .*found pytorch_model.bin.*save_pretrained"):
        check_source(ReferenceSource("ref", str(tmp_path)))


def test_adapter_is_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="mrpo merge"):
        check_source(ReferenceSource("ref", str(tmp_path)))


def test_missing_shard_file(tmp_path):
    write_model(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=f"1 of .* weight files .* are missing .*{gone.name}"):
        check_source(ReferenceSource("ref", str(tmp_path)))


def test_not_a_language_model(tmp_path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="transformers builds no causal language model of model type 'vit'"):
        check_source(ReferenceSource("ref", str(tmp_path)))


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_needs_consent(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own_model"
    write_model(folder)
    expected = plain_scores(folder, PAIRS, dtype=torch.float32)
    (folder / "own.py").write_text(REMOTE_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(folder, model_type="own_llama", auto_map=auto_map)
    with pytest.raises(ConfigError, match=r"'own_llama' is not part of transformers.*trust_remote_code: true"):
        check_source(ReferenceSource("ref", str(folder)))
    reference = load(folder, trust_remote_code=True)
    assert type(reference.model).__name__ == "OwnForCausalLM"
    assert reference.shared_prompt, "its layers are Llama's, whatever it calls itself"
    got = reference.score(reference.batch(PAIRS))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_unknown_model_type_without_code_is_refused_even_with_consent(tmp_path):
    write_model(tmp_path)
    edit_config(tmp_path, model_type="own_llama")
    with pytest.raises(ConfigError, match="'own_llama'"):
        check_source(ReferenceSource("ref", str(tmp_path), trust_remote_code=True))


# ------------------------------------------------------------------------------------------------------- refused in loading


def test_missing_and_unknown_tensors_are_named(tmp_path):
    write_model(tmp_path)

    def change(weights):
        weights["model.extra"] = weights.pop("model.norm.weight")

    edit_weights(tmp_path, change)
    with pytest.raises(ConfigError, match=r"ref: .*misses model.norm.weight and has unknown model.extra"):
        load(tmp_path)


def test_other_shape_is_named(tmp_path):
    write_model(tmp_path)
    edit_config(tmp_path, vocab_size=98)
    with pytest.raises(ConfigError, match=r"ref: .*weight is \[97, 32\] in the checkpoint but \[98, 32\]"):
        load(tmp_path)


def test_cut_file_is_named(tmp_path):
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors is not a whole safetensors file"):
        load(tmp_path)


def test_checkpoint_of_the_bare_body_has_no_prefix(tmp_path):
    write_model(tmp_path, "llama_tied")
    expected = plain_scores(tmp_path, PAIRS, dtype=torch.float32)

    def change(weights):
        for key in list(weights):
            weights[key.removeprefix("model.")] = weights.pop(key)

    edit_weights(tmp_path, change)
    assert torch.equal(load(tmp_path).score(collate_pairs(PAIRS, shared_prompt=True)), expected)


def test_leftovers_of_old_checkpoints_are_ignored(tmp_path):
    write_model(tmp_path, "gpt_neox")

    def change(weights):
        weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.full((4,), 9.0)

    expected = plain_scores(tmp_path, PAIRS, dtype=torch.float32)
    edit_weights(tmp_path, change)
    assert torch.equal(load(tmp_path).score(collate_pairs(PAIRS, shared_prompt=True)), expected)


def test_tied_weight_on_disk_under_either_name(tmp_path):
    write_model(tmp_path, "llama_tied")
    expected = plain_scores(tmp_path, PAIRS, dtype=torch.float32)
    edit_weights(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load(tmp_path).score(collate_pairs(PAIRS, shared_prompt=True)), expected)
    edit_weights(tmp_path, lambda w: w.pop("model.embed_tokens.weight"))
    assert torch.equal(load(tmp_path).score(collate_pairs(PAIRS, shared_prompt=True)), expected)


def test_tied_weights_that_differ_on_disk_are_refused(tmp_path):
    write_model(tmp_path, "llama")
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"ties .*embed_tokens.weight.* two different tensors"):
        load(tmp_path)
