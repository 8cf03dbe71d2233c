"""A reference on a shard group: it scores as the whole model does and holds its share, nothing more, before and after."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.references.placement import shard_group
from mrpo_scale.references.sharding import ReferenceSource, ShardedReference
from tests.tiny_types import tiny_model

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,  # odd: the last rank's share of the embedding is smaller
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
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
    # Two rows in the narrowest tensors: of four ranks two have none of them.
    "narrow": ("qwen2", {"hidden_size": 12, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder}, and one with an index of several files."""
    root = tmp_path_factory.mktemp("models")
    for kind, (model_type, options) in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2)
        model.save_pretrained(root / kind)
        if kind == "llama":
            model.save_pretrained(root / "llama_index", max_shard_size="30KB")
            assert len(list((root / "llama_index").glob("*.safetensors"))) > 2
    return root


def pairs_of(rank, call):
    """Different pairs on every rank and call, unequal in number and length; on the second call rank 1 has none."""
    if call == 1 and rank == 1:
        return None
    g = torch.Generator().manual_seed(10 * rank + call)

    def ids():
        return torch.randint(3, 97, (int(torch.randint(1, 30, (1,), generator=g)),), generator=g).tolist()

    return [PairTokens(ids(), ids(), ids()) for _ in range(1 + rank + call)]


def plain_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    enable_pair_scoring(model, "plain")
    return model


def assert_sharded(reference):
    """Every parameter is this rank's share; FSDP2 swaps whole tensors in and out of the modules, so this sees gathered ones."""
    total = 0
    for name, parameter in reference.model.named_parameters():
        assert isinstance(parameter, DTensor), name
        rows, size = parameter.shape[0], reference.group_size
        per_rank = -(-rows // size)
        start = min(reference.group.rank() * per_rank, rows)
        expected = (min(start + per_rank, rows) - start, *parameter.shape[1:])
        assert parameter.to_local().shape == expected or parameter.to_local().numel() == 0 == expected[0], name
        storage = parameter.to_local().untyped_storage().nbytes()
        assert storage <= per_rank * parameter[0:1].numel() * parameter.element_size(), (
            f"{name} keeps a larger tensor alive"
        )
        total += parameter.to_local().numel() * parameter.element_size()
    assert total == reference.bytes_per_rank


def check_scores(folder, shard_size):
    """Runs on every rank; returns what the test compares across ranks."""
    rank = dist.get_rank()
    reference = ShardedReference(ReferenceSource("ref", folder), shard_group(shard_size), CPU)
    plain = plain_model(folder)
    if reference.group is not None:
        assert_sharded(reference)
    for call in range(3):
        pairs = pairs_of(rank, call)
        batch = pairs and collate_pairs(pairs, shared_prompt=reference.shared_prompt)
        got = reference.score(batch)
        if pairs is None:
            assert got.shape == (0, 2)
        else:
            with torch.no_grad():
                torch.testing.assert_close(got, score_pairs(plain, batch), rtol=1e-6, atol=0)
        if reference.group is not None:
            assert_sharded(reference)
    assert reference.gathers == 3
    own, expected = dict(reference.model.named_buffers()), dict(plain.named_buffers())
    assert own.keys() == expected.keys() and any("inv_freq" in name for name in own)
    assert all(torch.equal(own[name], expected[name]) for name in own)
    return reference.group_size, reference.bytes_per_rank, reference.num_parameters


@pytest.mark.parametrize("kind", [*MODELS, "llama_index"])
def test_two_ranks(pool2, folders, kind):
    sizes, shares, parameters = zip(*pool2.run(check_scores, str(folders / kind), 2), strict=True)
    assert sizes == (2, 2)
    assert sum(shares) == 4 * parameters[0]
    assert max(shares) < 0.51 * sum(shares)


def dtypes(model):
    """Of parameters, and of buffers that are stored (GLM-4's router has a bias that is one)."""
    stored = model.state_dict().keys()
    return {name: x.dtype for name, x in [*model.named_parameters(), *model.named_buffers()] if name in stored}


def check_kept_float32(folder, dtype):
    rank = dist.get_rank()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    expected = dtypes(plain)
    assert set(expected.values()) == {dtype, torch.float32}
    enable_pair_scoring(plain, "plain")
    choose_end_to_end(plain, CPU)  # the attention that the reference's batches are laid out for
    check_pair_scoring(plain, "plain", shared_prompt=False, device=CPU)  # finds its scale
    for size in (1, 2):
        reference = ShardedReference(ReferenceSource("ref", folder, dtype=dtype), shard_group(size), CPU)
        assert dtypes(reference.model) == expected
        batch = reference.batch(pairs_of(rank, 0))
        with torch.no_grad():
            torch.testing.assert_close(reference.score(batch), score_pairs(plain, batch), rtol=1e-6, atol=0)
        if size == 2:
            assert_sharded(reference)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("inkling_text", torch.bfloat16), ("glm4_moe", torch.bfloat16), ("gpt_oss", torch.float16)],
)
def test_what_stays_in_float32(pool2, tmp_path, model_type, dtype):
    """What from_pretrained keeps in float32 (`_keep_in_fp32_modules_strict`; in float16 `_keep_in_fp32_modules` too)."""
    tiny_model(model_type).save_pretrained(tmp_path)
    pool2.run(check_kept_float32, str(tmp_path), dtype)


@pytest.mark.parametrize("shard_size", [1, 2, 3, 4])
def test_groups_of_four_ranks(pool4, folders, shard_size):
    sizes, shares, parameters = zip(*pool4.run(check_scores, str(folders / "narrow"), shard_size), strict=True)
    assert sizes == {1: (1, 1, 1, 1), 2: (2, 2, 2, 2), 3: (3, 3, 3, 1), 4: (4, 4, 4, 4)}[shard_size]
    assert sum(shares[: sizes[0]]) == 4 * parameters[0]


PLAIN = {  # sizes beside SIZES; without a head_dim of their own
    "zamba": {  # one attention block, used by each hybrid layer
        "num_hidden_layers": 6,
        "attn_layer_indices": [1, 3, 5],
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "layers_block_type": ["mamba", "hybrid"] * 3,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {  # two blocks that take turns
        "num_hidden_layers": 8,
        "layers_block_type": ["mamba", "hybrid"] * 4,
        "hybrid_layer_ids": [1, 3, 5, 7],
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
    },
    # Classes that do not say which of their modules are decoder layers.
    "openai-gpt": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "bert-generation": {"is_decoder": True},
    "xlm": {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "causal": True},  # its layers lie in several lists
}


def check_against_plain_forwards(folder):
    """Log-probs of this rank's pair, against the model's own logits on each text alone; returns the largest relative difference."""
    reference = ShardedReference(ReferenceSource("ref", folder), shard_group(2), CPU)
    assert_sharded(reference)
    pair = PairTokens([5, 6, 7, 8 + dist.get_rank()], [9, 10, 11, 12], [13, 14])
    got = reference.score(reference.batch([pair]))[0].double()
    assert_sharded(reference)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for response in (pair.chosen_ids, pair.rejected_ids):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([pair.prompt_ids + response])).logits[0].double()
        token_logps = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        expected.append(token_logps.sum())
    return ((got - torch.stack(expected)) / torch.stack(expected)).abs().max().item()


@pytest.mark.parametrize("kind", PLAIN)
def test_layers_that_share_or_are_not_named(pool2, tmp_path, kind):
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **PLAIN[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(tmp_path)
    assert max(pool2.run(check_against_plain_forwards, str(tmp_path))) < 1e-5


def bytes_gathered_for_a_window(folder):
    """Body in two forwards, then head: (bytes from the others, this rank's share of the head's and of all weights)."""
    from mrpo_scale.bench.communication import CollectiveCounter

    reference = ShardedReference(ReferenceSource("ref", folder), shard_group(2), CPU)
    batches = [reference.batch(pairs_of(dist.get_rank(), 0)) for _ in range(2)]
    head = reference.model.get_output_embeddings()
    with CollectiveCounter() as counted:
        for batch in batches:
            reference.response_hidden(batch)
        with reference.gathered_head() as whole:
            assert not isinstance(whole.weight, DTensor)
    assert_sharded(reference)
    reference.score(batches[0])  # and a whole forward afterwards leaves nothing whole either
    assert_sharded(reference)
    own = head.weight.to_local()
    return counted.bytes["broadcast"], own.numel() * own.element_size(), reference.bytes_per_rank


@pytest.mark.parametrize("kind", ["llama_tied", "llama"])
def test_a_window_gathers_a_head_once(pool2, folders, kind):
    """A tied head comes with the body's first forward and stays; an untied one is not part of the body's forwards."""
    for gathered, head, everything in pool2.run(bytes_gathered_for_a_window, str(folders / kind)):
        assert gathered == pytest.approx(2 * (everything - head) + head, rel=0.01)


def load_beside_zero3(folder):
    from transformers.integrations import deepspeed

    config = deepspeed.HfTrainerDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    )
    deepspeed.set_hf_deepspeed_config(config)
    try:
        reference = ShardedReference(ReferenceSource("ref", folder), shard_group(2), CPU)
        assert deepspeed._hf_deepspeed_config_weak_ref() is config
        assert deepspeed.is_deepspeed_zero3_enabled()
        batch = collate_pairs(pairs_of(dist.get_rank(), 0), shared_prompt=True)
        got = reference.score(batch)
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert_sharded(reference)
    with torch.no_grad():
        torch.testing.assert_close(got, score_pairs(plain_model(folder), batch), rtol=1e-6, atol=0)


def test_under_a_live_zero3_config(pool2, folders):
    pool2.run(load_beside_zero3, str(folders / "llama_tied"))


def load_where_one_rank_has_no_weights(folder, broken):
    try:
        ShardedReference(ReferenceSource("ref", broken if dist.get_rank() == 1 else folder), shard_group(2), CPU)
    except ConfigError as error:
        return str(error)
    return None


def test_a_failure_on_one_rank_is_one_on_all(pool2, folders, tmp_path):
    (tmp_path / "config.json").write_text((folders / "llama" / "config.json").read_text())
    started = time.monotonic()
    first, second = pool2.run(load_where_one_rank_has_no_weights, str(folders / "llama"), str(tmp_path))
    assert time.monotonic() - started < 20
    assert "rank 1 of this shard group failed: ConfigError: ref: no safetensors in" in first
    assert second.startswith("ref: no safetensors in")


def default_group():
    return shard_group(None).size()


def test_default_group_is_a_node(pool2):
    assert pool2.run(default_group) == [2, 2]
