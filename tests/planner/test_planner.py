"""The planner's arithmetic by hand: traffic over links, shards, what fits, what is cheapest."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.predict_scale import size_of
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.logps.flops import over_ranks
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.planner.cluster import Traffic, make_cluster
from mrpo_scale.planner.estimate import estimate, exchanged_by_attention
from mrpo_scale.planner.job import Job, PlannedModel, Setting
from mrpo_scale.planner.live import ScoredLive
from mrpo_scale.planner.model_size import assumed_fields, model_size
from mrpo_scale.planner.search import search, settings, shard_sizes, smallest_that_fits
from mrpo_scale.planner.workload import Workload
from mrpo_scale.planner.zero import policy_states, policy_traffic, read_zero
from tests.tools import require_module

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 171,  # two ranks do not divide it
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1001,
}


def source(folder, config, name="policy"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return ReferenceSource(name, str(folder), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return model_size(source(tmp_path_factory.mktemp("small"), LLAMA), itemsize=2)


@pytest.fixture(scope="module")
def big():
    return size_of("llama-3.1-8b")


def job_of(policy, references=1, window=64):
    lengths = np.tile(np.array([[[200, 150, 250]]]), (50, 1, 1))
    return Job(
        policy, tuple(PlannedModel(policy, 0) for _ in range(references)), Workload(lengths), window, 65536, False
    )


def test_an_adapter_has_states_and_frozen_weights_have_none(tmp_path):
    require_module("peft", "pip install peft")
    keys = MRPOConfig(
        str(tmp_path), use_cpu=True, use_peft=True, lora_r=4, lora_target_modules=["q_proj"], report_to="none"
    )
    size = model_size(source(tmp_path / "small", LLAMA), itemsize=2, adapter=keys)
    adapter = 3 * 4 * (64 + 64)
    plain = model_size(source(tmp_path / "small", LLAMA), itemsize=2)
    assert size.trained_parameters == adapter and size.parameters == plain.parameters + adapter
    cluster = make_cluster("h100-80gb", 2, 2, None)
    states = policy_states(size, read_zero("zero3"), cluster)
    assert states.device["optimizer"] == 12 * adapter // 2
    assert states.device["parameters"] > policy_states(plain, read_zero("zero3"), cluster).device["parameters"]
    assert states.device["gradients"] <= 2 * adapter // 2 + 2 * adapter


def test_a_quantized_reference_is_whole_and_small(tmp_path):
    """Head, embedding and norms in bfloat16, half a byte and 4/64 bytes for every other weight; never cut, never offloaded."""
    plain = model_size(source(tmp_path / "small", LLAMA), itemsize=2)
    size = model_size(replace(source(tmp_path / "small", LLAMA), quantize="nf4"), itemsize=2)
    linear = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 171)
    assert size.held_bytes(1) == 2 * (plain.parameters - linear) + linear // 2 + 4 * linear // 64
    assert plain.held_bytes(2) == 2 * plain.fsdp_shard(2) and size.dequantized_bytes == 2 * 64 * 171
    job, cluster = job_of(plain, 2), make_cluster("h100-80gb", 2, 2, None)
    job = replace(job, references=(job.references[0], PlannedModel(size, 0)))
    tried = list(settings(job, cluster))
    assert {(s.shard_size, s.offload) for s in tried} == {(1, False)}
    spread = next(s for s in tried if s.placement == "spread")
    assert estimate(job, spread, cluster).held["references"] == plain.held_bytes(1) + size.held_bytes(1)
    with pytest.raises(ConfigError, match="`quantize: nf4` of policy on a shard group of 2 ranks"):
        estimate(job, replace(spread, shard_size=None), cluster)


def test_a_mixture_gets_ranks_by_what_a_token_meets(tmp_path, small):
    experts = {"model_type": "mixtral", "num_local_experts": 16, "num_experts_per_tok": 1}
    size = model_size(source(tmp_path / "moe", {**LLAMA, **experts}), itemsize=2)
    assert size.active < size.parameters / 4 and small.active == small.parameters
    job = replace(job_of(small), references=(PlannedModel(small, 0), PlannedModel(size, 0)))
    cluster = make_cluster("h100-80gb", 4, 4, None)
    setting = Setting(1, False, read_zero("zero3"), placement="partition")
    assert ScoredLive(job, setting, cluster, 1).num_ranks == {0: 2, 1: 2}, "by all parameters it would have three"


def test_sizes_are_those_of_the_model(small):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    assert small.parameters == sum(p.numel() for p in model.parameters())
    assert small.head == 1001 * 64 and not small.tied and small.shared_prompt
    # Every parameter but those with an odd first side divides by two: down_proj [64, 171] does, gate and up [171, 64] do not.
    assert small.fsdp_shard(2) == (small.parameters + 2 * 3 * 64 + 2 * 64) // 2
    assert small.zero_shard(2) == small.parameters / 2, "flattened, all of them are even"
    assert small.zero_shard(3) > small.parameters / 3


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("mistral-large-2407", 122_610_069_504),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
    ],
)
def test_parameters_are_what_the_models_pages_say(name, parameters):
    """The stand-ins of benchmarks/predict_scale.py, each a config.json and nothing else."""
    assert size_of(name).parameters == parameters


def test_a_gather_by_hand():
    """16 GPUs in two nodes: 15/16 of the bytes arrive at each, half of all over the 8 cards of its node together."""
    cluster = make_cluster("h100-80gb", 16, 8, "400gbit")
    traffic = cluster.gather(1600, 16, calls=3)
    assert traffic == Traffic(1500 - 100, 100, 3 * 7, 3 * 1)
    assert cluster.gather(1600, 1) == Traffic()
    inside = cluster.gather(1600, 8)
    assert (inside.node_bytes, inside.network_bytes) == (1400, 0)
    # 450e9 and 50e9 bytes/s, three quarters of them.
    assert cluster.seconds(Traffic(450e9, 0, 0, 0)) == pytest.approx(4 / 3)
    assert cluster.seconds(Traffic(450e9, 100e9, 0, 1e6)) == pytest.approx(8 / 3 + 5)


@pytest.mark.parametrize(("network", "rate"), [("400gbit", 50e9), ("3200gbit/node", 50e9), ("100 Gbps", 12.5e9)])
def test_networks(network, rate):
    assert make_cluster("h100-80gb", 16, 8, network).network == rate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h300", 8, 8, None), "h300.*known ones are a100-40gb.*h100-80gb.*mi300x"),
        (("h100-80gb", 0, None, None), "--gpus 0"),
        (("h100-80gb", 12, 8, None), "multiple of `--gpus_per_node 8`"),
        (("h100-80gb", 8, 8, "fast"), "--network fast"),
    ],
)
def test_machines_that_make_no_cluster(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_cluster(*arguments)


def test_states_of_zero_by_hand(small):
    """16 bytes a parameter: bf16 weights and gradients, and 12 of the optimizer; ZeRO-2 keeps the weights whole."""
    cluster = make_cluster("h100-80gb", 2, 2, None)
    three, two = (policy_states(small, read_zero(name), cluster) for name in ("zero3", "zero2"))
    shard, bucket = small.zero_shard(2), 2 * 64 * 64
    whole = sum(
        math.prod(s) for s in small.shapes if math.prod(s) <= 640
    )  # norms: persistent under ten times the hidden size
    assert three.device == {
        "parameters": 2 * shard + 2 * whole,
        "gradients": 2 * shard + bucket,
        "optimizer": 12 * shard,
    }
    assert two.device == {
        "parameters": 2 * small.parameters,
        "gradients": 2 * shard + 2 * bucket,
        "optimizer": 12 * shard,
    }
    offloaded = policy_states(small, read_zero("zero3_offload"), cluster)
    assert offloaded.device == {"parameters": 2 * whole, "gradients": bucket}
    assert offloaded.host["optimizer"] == 12 * shard


def test_hpz_keeps_the_second_gather_in_the_node(big):
    cluster = make_cluster("h100-80gb", 64, 8, None)
    plain, hpz = (policy_traffic(big, read_zero(name), cluster) for name in ("zero3", "zero3_hpz"))
    total = 2 * big.parameters
    assert plain.first.network_bytes == hpz.first.network_bytes == pytest.approx(total * 7 / 8 / 8)
    assert plain.forward == plain.first and hpz.forward.network_bytes == 0, (
        "the second micro-batch of a step gathers in the node"
    )
    assert hpz.forwards(3).network_bytes == hpz.first.network_bytes
    again, third = (policy_traffic(big, read_zero("zero3"), cluster, checkpointing=on).backward for on in (False, True))
    layers = 2 * big.costs.recomputed_per_position / 2 * 7 / 8 / 8
    assert third.network_bytes - again.network_bytes == pytest.approx(layers), (
        "what is computed again is gathered again"
    )
    assert plain.backward.network_bytes == pytest.approx(2 * hpz.backward.network_bytes), "gather and scatter: scatter"
    extra = policy_states(big, read_zero("zero3_hpz"), cluster).device["parameters"]
    extra -= policy_states(big, read_zero("zero3"), cluster).device["parameters"]
    assert extra == 2 * (big.parameters - big.persistent(10 * big.hidden)) / 8


def test_gathers_and_scatters_are_counted_as_deepspeed_makes_them(big):
    """A gather for each weight that is cut; gradients in buckets of h squared, in which a larger one is alone."""
    layers, h = 32, 4096
    assert big.gathered_weights(10 * h) == 7 * layers + 2
    assert big.gradient_buckets(10**12) == 1 and big.gradient_buckets(1) == len(big.shapes)
    assert big.gradient_buckets(h * h) == 2 + 7 * layers


def test_a_sequence_group_shares_tokens_and_computes_one_micro_batch_after_the_other(big):
    cluster, job = make_cluster("h100-80gb", 64, 8, None), job_of(big, 1)
    alone = Setting(1, True, read_zero("zero3_hpz"), live=False)
    one, four = (estimate(job, replace(alone, sequence_parallel=n), cluster) for n in (1, 4))
    kept = [found.moments["forward and backward"]["activations"] for found in (one, four)]
    assert kept[1] == pytest.approx(kept[0] / 4, rel=0.05) and one.useful_flops == four.useful_flops
    sent = policy_traffic(big, alone.zero, cluster, checkpointing=True)
    exchanged = (
        3 * 4 * exchanged_by_attention(big, 150, 1, 4, cluster).node_bytes
    )  # forward, again, backward: of four micro-batches
    assert exchanged == 3 * 2 * 600 * 32 * 128 * 2 * (32 + 8) * 3 / 4, (
        "two bytes; heads of queries, keys, values and outputs"
    )
    more = four.traffic["policy"].node_bytes - one.traffic["policy"].node_bytes
    assert more == pytest.approx(exchanged + 3 * (sent.forward.node_bytes + sent.backward.node_bytes))
    assert exchanged_by_attention(big, 10, 1, 16, cluster).network_bytes > 0, "over two nodes"


def test_the_three_cheapest_engines_and_groups_that_nodes_are_not_made_of(big, tmp_path):
    cluster, job = make_cluster("h100-80gb", 64, 8, None), job_of(big, 1)
    plans = search(job, cluster, live=False).plans
    assert len(plans) == 3 and len({plan.setting.zero.name for plan in plans}) == 3
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    for keys, message in (
        (
            {"zero_hpz_partition_size": 3},
            "`zero_hpz_partition_size: 3` does not divide 8, the ranks of a node; set one of 1, 2, 4, 8",
        ),
        (
            {"mics_shard_size": 8},
            "`zero_optimization.mics_shard_size: 8`: DeepSpeed 0.19 has no MiCS.*zero_hpz_partition_size",
        ),
    ):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, **keys}}))
        with pytest.raises(ConfigError, match=message):
            read_zero(str(tmp_path / "ds.json"), cluster)


def test_references_by_placement(big):
    """Three copies of the policy on 8 GPUs: all three in eighths, or 3, 3 and 2 ranks, of which a rank of the two holds a half."""
    cluster, job = make_cluster("h100-80gb", 8, 8, None), job_of(big, 3)
    setting = Setting(1, True, read_zero("zero3"))
    held = [
        estimate(job, replace(setting, placement=kind), cluster).held["references"] for kind in ("spread", "partition")
    ]
    assert held[0] == pytest.approx(3 * 2 * big.parameters / 8, rel=1e-3)
    assert held[1] == pytest.approx(2 * big.parameters / 2, rel=1e-3)
    cached = estimate(job, replace(setting, live=False), cluster)
    assert "references" not in cached.held and cached.reference_flops == 0
    offloaded = estimate(job, replace(setting, offload=True), cluster)
    assert "references" not in offloaded.held and offloaded.host["references"] == held[0]


def test_overhead_and_its_floor(big):
    """References as large as the policy: K=3 live adds two more no-grad forwards to DPO's one."""
    cluster, job = make_cluster("h100-80gb", 8, 8, None), job_of(big, 3)
    setting = Setting(1, False, read_zero("zero3"))
    dpo, mrpo = (estimate(job, replace(setting, only_anchor=only), cluster) for only in (True, False))
    assert mrpo.reference_flops == 3 * dpo.reference_flops and mrpo.policy_flops == dpo.policy_flops
    assert 1.4 < mrpo.flops / dpo.flops < 1.5 and mrpo.seconds > dpo.seconds
    assert mrpo.useful_flops == pytest.approx(6 * big.parameters * 64 * 600, rel=0.1)


def test_the_cheapest_that_fits(big):
    """On 8 H100s an 8B policy and three 8B references fit; the winner is no slower than any setting that fits."""
    cluster, job = make_cluster("h100-80gb", 8, 8, None), job_of(big, 3)
    found = search(job, cluster)
    everything = [estimate(job, setting, cluster) for setting in settings(job, cluster)]
    fitting = [e for e in everything if e.fits]
    assert found.tried == len(everything) > 100 and found.fitting == len(fitting)
    assert found.best is not None and found.best.fits
    assert found.best.seconds <= 1.01 * min(e.seconds for e in fitting)
    assert not any(s.zero.name == "zero3_hpz" for s in settings(job, cluster)), "there is one node"


def test_nothing_fits_until_there_are_more(big):
    cluster, job = make_cluster("rtx4090", 1, 1, None), job_of(big, 3, window=8)
    found = search(job, cluster, live=False)
    assert found.best is None or found.best.setting.zero.offload_optimizer
    grown = smallest_that_fits(job, make_cluster("rtx4090", 1, 1, None))
    assert grown is not None and grown[0].gpus > 1 and grown[1].best is not None


def test_shard_sizes():
    assert shard_sizes(make_cluster("h100-80gb", 32, 8, None)) == [1, 2, 4, 8, 16, 32]
    assert shard_sizes(make_cluster("h100-80gb", 1, 1, None)) == [1]


def test_a_config_that_cannot_be_estimated_names_the_field(tmp_path):
    mamba = source(
        tmp_path / "mamba", {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    )
    with pytest.raises(ConfigError, match="`num_attention_heads`"):
        model_size(mamba, itemsize=2)


def test_defaults_that_a_config_leaves_to_transformers_are_named(tmp_path):
    lacking = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
    assert assumed_fields(source(tmp_path / "a", lacking)) == ["intermediate_size: 11008"]
    assert assumed_fields(source(tmp_path / "b", LLAMA)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 1}}', "stage: 1"),
        ("{}", "zero_optimization.stage"),
        ("no", "DeepSpeed config, is not JSON"),
    ],
)
def test_ds_configs_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_zero(str(tmp_path / "ds.json"))
    with pytest.raises(ConfigError, match="zero3_hpz"):
        read_zero("zero9")


def test_a_step_waits_for_the_slowest_rank_of_each_micro_batch(small):
    """What is predicted is what dealing gives: no more for one pair a micro-batch than for several, and a bound in tokens holds."""
    lengths = np.random.default_rng(0).lognormal(5, 0.6, (500, 1, 3)).astype(np.int64) + 1
    workload = Workload(lengths)
    one, two = (workload.policy(small, micro_batch=n, accumulation=4, ranks=16) for n in (1, 2))
    assert 0.6 < one.efficiency < two.efficiency < 1
    for share, pairs in ((one, 4), (two, 8)):
        least = pairs * lengths.sum((1, 2)).mean()  # two pairs lie in two rows, padded to each other
        assert 0.95 * least < share.mean.positions < 1.1 * least
        assert share.mean.positions / share.total.positions == pytest.approx(share.efficiency, rel=0.05)
    assert workload.policy(small, micro_batch=2, accumulation=4, ranks=1).efficiency == 1
    most = 2 * int(lengths.sum((1, 2)).max())
    bounded = workload.policy(small, micro_batch=8, accumulation=1, ranks=16, max_tokens=most)
    assert max(work.positions for work in bounded.forwards) <= most
    assert workload.largest_micro_batch(small, 8, most).positions <= most
    assert workload.largest_micro_batch(small, 8).positions > most


def test_a_reference_is_dealt_every_pair_once(small):
    lengths = np.tile(np.array([[[20, 15, 25]]]), (50, 1, 1))
    share = Workload(lengths).reference(small, 0, pairs=24, ranks=16, tokens_per_forward=65536)
    assert share.mean.positions == 60 * 24 / 16 and share.total.positions == 120


def test_a_budget_of_tokens_reaches_estimate_and_search(small):
    cluster, job = make_cluster("h100-80gb", 4, 4, None), job_of(small)
    setting = Setting(16, False, read_zero("zero3"), max_tokens=1300)
    found = estimate(job, setting, cluster)
    assert found.accumulation == 1 and found.efficiency == 1  # 600 tokens a pair, two fit
    fixed = estimate(job, replace(setting, max_tokens=None, micro_batch=2), cluster)
    assert fixed.accumulation == 8 and found.traffic == fixed.traffic and found.peak == fixed.peak
    assert {s.micro_batch for s in settings(job, cluster, 1300)} == {16}
    assert all(s.max_tokens == 1300 for s in settings(job, cluster, 1300))


def test_a_sequence_group_keeps_a_part_of_a_pair(small):
    """Each rank a quarter of the tokens in four turns: a quarter of the activations, keys and values twice and of repeated heads,
    the same work, four times the gathers."""
    cluster, job = make_cluster("h100-80gb", 4, 4, None), job_of(small)
    setting = Setting(1, False, read_zero("zero3"))
    alone, together = (estimate(job, replace(setting, sequence_parallel=n), cluster) for n in (1, 4))
    kept = [found.moments["forward and backward"]["activations"] for found in (alone, together)]
    work, repeats = (
        over_ranks(job.workload.largest_micro_batch(small, 1), 4),
        math.lcm(small.key_heads, 4) // small.key_heads,
    )
    more = (work.keys + work.positions) * repeats - work.keys
    more *= small.activations.num_layers * 2 * small.itemsize * small.key_heads * small.head_size
    assert kept[1] == pytest.approx(kept[0] / 4 + more, rel=0.02)
    assert together.policy_flops == alone.policy_flops and together.held == alone.held
    assert together.traffic["policy"] != alone.traffic["policy"]
    bounded = replace(setting, max_tokens=600)
    fitting = estimate(job, replace(bounded, sequence_parallel=4), cluster).moments["forward and backward"][
        "activations"
    ]
    assert fitting == pytest.approx(kept[0] + 4 * more, rel=0.02), "as many positions on a rank as the key says"
