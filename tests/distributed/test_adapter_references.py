"""Adapters on one base on two ranks: every layout gives the scores of one process, and holds and gathers the base once."""

import pytest
import torch
import torch.distributed as dist

from mrpo_scale.data.inputs import prepare_sets
from mrpo_scale.data.window import WeightedPairs
from mrpo_scale.models.plan import plan_models
from mrpo_scale.references.scores import open_scores
from tests.distributed.test_reference_scores import config
from tests.references.test_adapters import ADAPTERS, write_adapter
from tests.tiny import pair_dataset, write_models
from tests.tools import require_module

require_module("peft", "pip install peft")
ROWS = 9
SHARDED = {"ref_shard_size": 2}
#: How each way is asked for, with two adapters on a base that ties its head, and between them the base itself.
WAYS = {
    "mapped": {"ref_shard_size": 1},
    "sharded": SHARDED,
    "offload": {**SHARDED, "ref_offload": True},
    "several forwards": {**SHARDED, "ref_tokens_per_forward": 60},
    "partition": {"ref_placement": "partition"},
    "partition, sharded": {**SHARDED, "ref_placement": "partition"},
    "precompute": {**SHARDED, "ref_scoring": "precompute"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The policy, and the references beside the anchor."""
    root = tmp_path_factory.mktemp("models")
    folders = write_models(root)
    one, two = (
        {"model": folders["qwen2"], "adapter": write_adapter(folders["qwen2"], root / name, seed, **settings)}
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    )
    return folders["llama"], [one, folders["qwen2"], two, folders["gpt_neox"]]


def score_all_ways(policy, refs, output_dir, ways):
    """{way: (scores of this rank's rows, what each reference holds, gathers)}."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = {}
    for way, keys in ways.items():
        keys = {**keys, "ref_cache_dir": str(output_dir / way)} if "ref_scoring" in keys else keys
        args = config(output_dir, **keys)
        plan = plan_models(policy, refs, args, None)
        pair_sets = prepare_sets(plan, args, pair_dataset(ROWS), None)
        scores = open_scores(plan, args, pair_sets)
        pairs = pair_sets["train"]
        examples = [WeightedPairs(pairs)[row] for row in range(rank, ROWS, world)]
        logps = [scores.logps(examples, pairs) for _ in range(2)]
        assert torch.equal(*logps), "whatever was scored before"
        held = {
            k: (r.model.weight_bytes, r.model.bytes_per_rank, id(r.model.model)) for k, r in scores.references.items()
        }
        found[way] = logps[0], held, {k: r.model.gathers for k, r in scores.references.items()}
    return found


def test_every_layout_on_two_ranks(pool2, models, tmp_path):
    policy, refs = models
    expected = score_all_ways(policy, refs, tmp_path / "alone", {"alone": {}})["alone"][0]
    ranks = pool2.run(score_all_ways, policy, refs, tmp_path / "out", WAYS)
    for way in WAYS:
        for rank, found in enumerate(ranks):
            scores, held, gathers = found[way]
            torch.testing.assert_close(scores, expected[:, rank::2], rtol=1e-5, atol=0, msg=way)
            if way == "precompute":
                assert held == {}
            elif 1 in held:
                (_, first, model), (weights, plain, same), (_, last, also) = held[1], held[2], held[3]
                assert model == same == also and (plain, first - weights > 0, last > 0) == (0, True, True), way
                assert gathers[1] == gathers[2] == gathers[3] and (gathers[1] == 2 or "forwards" in way), way
    assert all({1, 2, 3} <= set(found["partition"][1]) or not {1, 2, 3} & set(found["partition"][1]) for found in ranks)
    half = [found["sharded"][1][2][0] for found in ranks]
    assert sum(half) == pytest.approx(ranks[0]["mapped"][1][2][0], rel=0.01), "the base, once over both"
