"""Mixtures of experts, and other types whose tensors lie on disk in another layout, as references on shard groups."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.sweep_models import PAIRS, plain_logps, relative
from mrpo_scale.models.on_disk import Converted, OnDisk
from mrpo_scale.models.stored import build_on_meta, stored_tensors
from mrpo_scale.references.placement import shard_group
from mrpo_scale.references.sharding import ReferenceSource, ShardedReference, check_source
from tests.distributed.test_sharding import assert_sharded
from tests.tiny_types import tiny_model

CPU = torch.device("cpu")
# Experts stacked, with the layout of each family's checkpoints; a hybrid with recurrent layers; matrices that are joined (Kimi's
# and OLMo's convolutions) or split (HRM) where they are sharded; experts stacked on disk.
TYPES = [
    *("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "nemotron_h", "jamba", "phimoe"),
    *("kimi_linear", "olmo_hybrid", "hrm_text", "gpt_oss"),
]


def three_experts(folder):
    """Fewer than four ranks, and not as many on each of two."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size="20KB")  # a layer's experts lie in several files
    assert len(list(folder.glob("*.safetensors"))) > 2
    return str(folder)


@torch.no_grad()
def difference(folder, shard_size):
    """Relative, of this rank's log-probs against plain forwards of what ``from_pretrained`` loads."""
    reference = ShardedReference(ReferenceSource("ref", folder), shard_group(shard_size), CPU)
    batch = reference.batch(PAIRS)
    got = reference.score(batch)
    if reference.group is not None:
        assert_sharded(reference)
    return relative(got, plain_logps(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()))


@pytest.mark.parametrize("model_type", TYPES)
def test_two_ranks(pool2, tmp_path, model_type):
    tiny_model(model_type).save_pretrained(tmp_path)
    for shard_size in (1, 2):
        assert max(pool2.run(difference, str(tmp_path), shard_size)) < 1e-5


@pytest.mark.parametrize("shard_size", [2, 4])
def test_more_ranks_than_experts(pool4, tmp_path, shard_size):
    assert max(pool4.run(difference, three_experts(tmp_path), shard_size)) < 1e-5


# ---------------------------------------------------------------------------------------------------------- what is read


def stored(folder):
    source = ReferenceSource("ref", str(folder))
    model = build_on_meta(source, check_source(source))
    return stored_tensors(model, sorted(folder.glob("*.safetensors")), "ref")


GATES = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def read_keys(monkeypatch):
    """The keys that are read, in order; the reading itself is real."""
    keys, read = [], OnDisk.read
    monkeypatch.setattr(OnDisk, "read", lambda self, rows=None: (keys.append(self.key), read(self, rows))[1])
    return keys


def test_a_rank_reads_its_experts_only(tmp_path, read_keys):
    three_experts(tmp_path)
    tensors = stored(tmp_path)
    whole = tensors[GATES].read()
    assert len(read_keys) == 6
    read_keys.clear()
    expert = tensors[GATES].read(slice(2, 3))
    assert torch.equal(expert, whole[2:3])
    assert sorted(read_keys) == [f"model.layers.1.block_sparse_moe.experts.2.w{i}.weight" for i in (1, 3)]


@pytest.mark.parametrize("model_type", ["kimi_linear", "hrm_text"])
def test_what_is_not_made_row_by_row_is_made_whole(tmp_path, model_type):
    """Part of the rows is a part of the whole, whatever the converter does along them."""
    tiny_model(model_type).save_pretrained(tmp_path)
    converted = {name: t for name, t in stored(tmp_path).items() if isinstance(t, Converted)}
    assert converted
    for tensor in converted.values():
        whole = tensor.read()
        assert list(whole.shape) == tensor.shape
        half = -(-len(whole) // 2)
        assert torch.equal(torch.cat([tensor.read(slice(0, half)), tensor.read(slice(half, len(whole)))]), whole)


# ----------------------------------------------------------------------------------------------------------- what is broken


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("experts.2.w1", r"gate_up_proj cannot be made of"),
        ("experts.2.w2", r"down_proj is \[2, 32, 48\] in the checkpoint but \[3, 32, 48\]"),
        ("block_sparse_moe.gate.", r"misses model.layers.1.mlp.gate.weight"),
    ],
)
def test_a_tensor_that_is_gone(tmp_path, gone, said):
    three_experts(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        kept = {key: t for key, t in tensors.items() if not (gone in key and "layers.1" in key)}
        if len(kept) < len(tensors):
            save_file(kept, file, {"format": "pt"})
    with pytest.raises(Exception, match=said) as refused:
        ShardedReference(ReferenceSource("ref", str(tmp_path)), None, CPU)
    assert type(refused.value).__name__ == "ConfigError" and "\n" not in str(refused.value)
