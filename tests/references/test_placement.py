"""Which ranks hold which reference."""

import itertools
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale import MRPOConfig
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.references import loading
from mrpo_scale.references.placement import Share, find_nodes, partition, placement_table, process_groups, spread

TWO_NODES = [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_spread_fills_nodes_unless_told():
    assert spread([0, 2], TWO_NODES, None).groups == dict.fromkeys((0, 2), ((0, 1, 2, 3), (4, 5, 6, 7)))
    assert spread([0], TWO_NODES, 8).groups[0] == (tuple(range(8)),)
    assert spread([0], [[0, 1, 2]], 2).groups[0] == ((0, 1), (2,))
    assert spread([0], [[0, 1], [2]], None).groups[0] == ((0, 1), (2,)), "nodes may differ in size"


def test_partition_follows_cost():
    """A reference of twice the cost gets twice the ranks, and one that costs next to nothing still gets one."""
    node = [list(range(8))]
    placement = partition({0: 2.0, 1: 1.0, 2: 1.0}, node, None)
    assert [len(placement.ranks(k)) for k in range(3)] == [4, 2, 2]
    assert [len(partition({0: 1e9, 1: 1.0, 2: 1.0}, node, None).ranks(k)) for k in range(3)] == [6, 1, 1]


def test_partition_divides_nodes_where_they_suffice():
    """Eight nodes of eight for 70B, 72B and 32B: three, three and two nodes, each group a node."""
    nodes = [list(range(n, n + 8)) for n in range(0, 64, 8)]
    groups = partition({0: 70.0, 1: 72.0, 2: 32.0}, nodes, None).groups
    assert [len(groups[k]) for k in range(3)] == [3, 3, 2]
    assert [group for k in range(3) for group in groups[k]] == [tuple(node) for node in nodes]


def test_partition_groups_stay_on_their_node():
    """Three references on two nodes: ranks are divided, and a reference that lies on both nodes has a group on each."""
    groups = partition({0: 4.0, 1: 2.0, 2: 2.0}, TWO_NODES, None).groups
    assert groups == {0: ((0, 1, 2, 3),), 1: ((4, 5),), 2: ((6, 7),)}
    assert partition({0: 5.0, 1: 1.0, 2: 1.0}, TWO_NODES, None).groups[0] == ((0, 1, 2, 3), (4, 5))
    assert partition({0: 5.0, 1: 1.0, 2: 1.0}, TWO_NODES, 2).groups[0] == ((0, 1), (2, 3), (4, 5))


SIZES = [
    (w, k, size) for w, k, size in itertools.product([1, 2, 3, 4, 16], [1, 2, 3, 5], [None, 1, 2]) if w >= (size or 1)
]


@pytest.mark.parametrize(("world", "references", "size"), SIZES)
def test_every_rank_works_and_every_reference_is_whole_somewhere(world, references, size):
    placement = partition({k: 1.0 + k for k in range(references)}, [list(range(world))], size)
    assert sorted(placement.groups) == list(range(references))
    ranks = [placement.ranks(k) for k in range(references)]
    assert all(ranks) and {rank for some in ranks for rank in some} == set(range(world))
    assert sum(map(len, ranks)) == max(world, references), "no rank holds two references while another holds none"


def test_fewer_ranks_than_references_share_the_cost():
    """Costs 5, 4, 3, 2 on two ranks: 5 + 2 and 4 + 3."""
    placement = partition({0: 3.0, 1: 5.0, 2: 4.0, 3: 2.0}, [[0, 1]], None)
    assert placement.ranks(1) == placement.ranks(3) == [0]
    assert placement.ranks(2) == placement.ranks(0) == [1]


@pytest.mark.parametrize("size", [0, -1, 5])
def test_shard_size_that_does_not_fit(size):
    nodes = [[0, 1, 2, 3]]
    for place in (lambda: spread([0], nodes, size), lambda: partition({0: 1.0}, nodes, size)):
        with pytest.raises(ConfigError, match=f"`ref_shard_size: {size}` .* run of 4 process"):
            place()


def test_partition_goes_by_what_a_token_meets(tmp_path, monkeypatch):
    """Sixteen experts of which a token meets one cost memory, not time: the mixture gets as many ranks as the dense model."""
    sources = {}
    for kind, sizes in {"llama": {}, "mixtral": {"num_local_experts": 16, "num_experts_per_tok": 1}}.items():
        config = AutoConfig.for_model(
            kind, vocab_size=97, hidden_size=32, intermediate_size=256, num_hidden_layers=2, **sizes
        )
        config.num_attention_heads, config.num_key_value_heads = 4, 2
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        sources[kind] = SimpleNamespace(source=ReferenceSource(kind, str(tmp_path / kind)))
    monkeypatch.setattr(loading, "ranks_that_share", lambda *_: [[0, 1, 2, 3]])
    plan, args = (
        SimpleNamespace(references=list(sources.values())),
        MRPOConfig(str(tmp_path), use_cpu=True, report_to="none"),
    )
    args.ref_placement = "partition"
    placement = loading._place(plan, args, [0, 1], {0: 100.0, 1: 100.0})
    assert [len(placement.ranks(k)) for k in (0, 1)] == [2, 2]


def test_without_processes_there_is_no_group():
    assert find_nodes() == [[0]]
    assert process_groups(spread([0], [[0]], None)) == {}


def test_placement_table():
    """Two references on 64 ranks, one on eight nodes and one whose scores are all cached."""
    nodes = [list(range(n, n + 8)) for n in range(0, 64, 8)]
    shares = {0: Share("llama", 2**30, 2**30, 8, shared_prompt=True, offload=False, mapped=False)}
    lines = placement_table(["anchor", "other"], spread([0], nodes, None), shares, {0: 2}).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "reference model type on ranks GiB per rank gathers/step MiB received/step attention",
        "anchor llama 0-63, in 8 groups of 8 1.000 2 14336.0 shared prompt",
        "other - not loaded: all scores are cached 0 0 0 -",
    ]
