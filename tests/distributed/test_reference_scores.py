"""Every way to a reference score gives the same score: placements, shard groups, host memory, ahead of time, from the cache."""

import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm

from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.recipe import resource
from mrpo_scale.data.inputs import prepare_sets
from mrpo_scale.data.window import WeightedPairs
from mrpo_scale.models.plan import plan_models
from mrpo_scale.objective import Objective
from mrpo_scale.references.scores import CachedScores, LiveScores
from mrpo_scale.references.scores import open_scores as open_reference_scores
from tests.distributed.test_training import train
from tests.tiny import pair_dataset, write_models

ROWS = 19
#: How each way is asked for. `spread` is live and without a cache.
WAYS = {
    "spread": {},
    "partition": {"ref_placement": "partition"},
    "offload": {"ref_offload": True},
    "several forwards": {"ref_tokens_per_forward": 60},
    "partition, several forwards": {"ref_placement": "partition", "ref_tokens_per_forward": 60},
    "live with a cache": {"cached": True},
    "partition with a cache": {"ref_placement": "partition", "cached": True},
    "precompute": {"ref_scoring": "precompute", "cached": True},
    "follow": {"ref_scoring": "follow", "ref_follow_timeout": 0, "cached": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def config(output_dir, **keys):
    if dist.is_initialized():
        deepspeed_comm.init_distributed(dist_backend="gloo")
    return MRPOConfig(
        output_dir=str(output_dir),
        deepspeed=str(resource("ds_configs") / "zero3_cpu.json") if dist.is_initialized() else None,
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, **keys},
    )


def open_scores(folders, output_dir, **keys):
    args = config(output_dir, **keys)
    plan = plan_models(folders["llama"], [folders["qwen2"], folders["gpt_neox"]], args, None)
    pair_sets = prepare_sets(plan, args, pair_dataset(ROWS), pair_dataset(5, seed=1))
    return open_reference_scores(plan, args, pair_sets), pair_sets


def score_rows(folders, output_dir, **keys):
    """{row: scores} of this rank's rows, twice, in unequal batches (the last rank's second is empty), and the gathers."""
    scores, pair_sets = open_scores(folders, output_dir, **keys)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pairs = pair_sets["train"]
    examples = [WeightedPairs(pairs)[row] for row in range(rank, ROWS, world_size)]
    # Every rank comes equally often, as windows do, with other numbers of pairs.
    half = 1 + rank
    batches = [examples[:half], examples[half:]] if rank < world_size - 1 or world_size == 1 else [examples, []]
    found = {}
    for batch in batches:
        values = scores.score(batch, pairs, Objective()).ref_logps_KP2
        assert values.shape == (3, len(batch), 2)
        found |= {example.row: values[:, i].tolist() for i, example in enumerate(batch)}
    scores.flush(refresh=True)
    again = torch.cat([scores.logps(batch, pairs) for batch in batches], dim=1)
    expected = torch.tensor([found[e.row] for batch in batches for e in batch]).transpose(0, 1)
    if "ref_cache_dir" in keys:
        assert torch.equal(again, expected), "what was read is not, bit for bit, what was scored"
    gathers = {k: reference.model.gathers for k, reference in scores.references.items()}
    return found, scores.live, gathers


@pytest.fixture(scope="module")
def expected(folders, tmp_path_factory):
    return score_rows(folders, tmp_path_factory.mktemp("alone"))[0]


def fill(folders, output_dir, cache):
    open_scores(folders, output_dir, ref_scoring="precompute", ref_cache_dir=cache)


def compare_all_ways(pool, folders, tmp_path, expected, shard_size, ways=tuple(WAYS)):
    for way in ways:
        keys = dict(WAYS[way])
        if keys.pop("cached", False):
            keys["ref_cache_dir"] = str(tmp_path / way)
        if way == "follow":
            shutil.copytree(tmp_path / "precompute", tmp_path / "follow")
        ranks = pool.run(score_rows, folders, tmp_path / "out", ref_shard_size=shard_size, **keys)
        found = {row: value for rank, _, _ in ranks for row, value in rank.items()}
        assert sorted(found) == list(range(ROWS)), way
        for row, value in found.items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(expected[row]), rtol=1e-5, atol=0, msg=way)
        for _, live, gathers in ranks:
            # Each rank scored two windows, twice unless the second time came from the cache.
            once = dict.fromkeys(gathers, 2 if "ref_cache_dir" in keys else 4)
            assert live == ([] if way in ("precompute", "follow") else [0, 1, 2]), way
            assert gathers == ({} if not live else once) or "several" in way, way


@pytest.mark.parametrize("shard_size", [1, 2])
def test_all_ways_on_two_ranks(folders, tmp_path, pool2, expected, shard_size):
    compare_all_ways(pool2, folders, tmp_path, expected, shard_size)


# Whole references that are spread have nothing to do with other ranks: on four it is as on two.
FOUR = {1: [way for way in WAYS if "partition" in way], 2: list(WAYS), 4: list(WAYS)}


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", FOUR)
def test_all_ways_on_four_ranks(folders, tmp_path, pool4, expected, shard_size):
    compare_all_ways(pool4, folders, tmp_path, expected, shard_size, FOUR[shard_size])


TRAININGS = ["partition", "offload", "precompute", "live with a cache", "follow"]


def compare_training(pool, folders, tmp_path, accumulation, shard_size):
    """Six steps, so that rows of the first epoch come again in the second."""
    split = {"batch_size": 1, "accumulation": accumulation, "max_steps": 6}
    logs = {}
    for way in ["spread", *TRAININGS]:
        keys = dict(WAYS[way])
        if keys.pop("cached", False):
            keys["ref_cache_dir"] = str(tmp_path / "precompute" if way == "follow" else tmp_path / way)
        logs[way] = pool.run(train, folders, tmp_path / "out", **split, ref_shard_size=shard_size, timeout=300, **keys)[
            0
        ]
    for way in TRAININGS:
        for entry, live in zip(logs[way]["log"], logs["spread"]["log"], strict=True):
            for key in ("loss", "grad_norm"):
                assert entry[key] == pytest.approx(live[key], rel=1e-5), (way, entry["step"], key)
        assert logs[way]["held_out"]["eval_loss"] == pytest.approx(logs["spread"]["held_out"]["eval_loss"], rel=1e-5), (
            way
        )
    assert len(logs["spread"]["log"]) == 6


# The layouts score alike (above), so one of each world trains: whole references on two ranks, and two groups of two on four.
def test_all_ways_train_alike_on_two_ranks(folders, tmp_path, pool2):
    compare_training(pool2, folders, tmp_path, accumulation=2, shard_size=1)


@pytest.mark.slow
def test_all_ways_train_alike_on_four_ranks(folders, tmp_path, pool4):
    compare_training(pool4, folders, tmp_path, accumulation=1, shard_size=2)


def with_a_flipped_bit(folder, target):
    """A model of the same shapes whose last weight differs in its last bit."""
    shutil.copytree(folder, target)
    weights = target / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    return str(target)


def keys_under_zero3(folders, output_dir, cache):
    scores, _ = open_scores(folders, output_dir, ref_cache_dir=cache)
    return [store.identity.key for store in scores.stores]


def test_models_of_one_shape_never_share_a_key_under_zero3(folders, tmp_path, pool2):
    """Parameters in memory are empty under ZeRO-3, where two models once hashed alike."""
    twin = {**folders, "qwen2": with_a_flipped_bit(folders["llama"], tmp_path / "twin")}
    keys = pool2.run(keys_under_zero3, twin, tmp_path, str(tmp_path / "cache"))
    assert keys[0] == keys[1] and len(set(keys[0])) == 3


def test_a_swapped_reference_costs_that_reference(folders, tmp_path):
    """The cache of the two that stayed is read, one alone is loaded, and only rows that are new are scored."""
    cache = str(tmp_path / "cache")
    fill(folders, tmp_path, cache)
    swapped = {**folders, "gpt_neox": with_a_flipped_bit(folders["gpt_neox"], tmp_path / "other")}
    scores, _ = open_scores(swapped, tmp_path, ref_cache_dir=cache)
    assert scores.live == [2] and list(scores.references) == [2]
    complete, _ = open_scores(folders, tmp_path, ref_cache_dir=cache)
    assert complete.live == [] and not complete.references


def test_scores_are_opened_as_what_they_are(folders, tmp_path):
    """Without a cache nothing is looked up, written or kept; with one that is whole, nothing is loaded."""
    live, pair_sets = open_scores(folders, tmp_path)
    assert isinstance(live, LiveScores) and (live.live, list(live.stores)) == ([0, 1, 2], [])
    cache = str(tmp_path / "cache")
    fill(folders, tmp_path, cache)
    cached, _ = open_scores(folders, tmp_path, ref_cache_dir=cache)
    assert isinstance(cached, CachedScores) and (cached.live, cached.references) == ([], {})
    pairs = pair_sets["train"]
    examples = [WeightedPairs(pairs)[row] for row in range(4)]
    torch.testing.assert_close(cached.logps(examples, pairs), live.logps(examples, pairs), rtol=1e-5, atol=0)


def test_a_new_row_costs_one_row(folders, tmp_path):
    cache = str(tmp_path / "cache")
    fill(folders, tmp_path, cache)
    args = config(tmp_path, ref_scoring="precompute", ref_cache_dir=cache)
    plan = plan_models(folders["llama"], [folders["qwen2"], folders["gpt_neox"]], args, None)
    before, after = pair_dataset(ROWS), pair_dataset(ROWS)
    changed = after.map(
        lambda row, i: {"chosen": [{"role": "assistant", "content": "ten blue"}]} if i == 7 else {}, with_indices=True
    )
    old = prepare_sets(plan, args, before, None)["train"].row_keys
    new_sets = prepare_sets(plan, args, changed, None)
    assert np.flatnonzero(old != new_sets["train"].row_keys).tolist() == [7]
    scores = open_reference_scores(plan, args, new_sets)
    assert [len(list(store.folder.glob("part-*"))) for store in scores.stores] == [2, 2, 2]
    assert [len(store) for store in scores.stores] == [ROWS, ROWS, ROWS], "the changed row and the 18 that are wanted"
