"""`mrpo bench` as people start it, on two ranks under ZeRO-3 and on one: what it counts, that arms compare, and its errors."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.bench.clock import PHASES
from mrpo_scale.bench.command import bench
from mrpo_scale.bench.show import gathered_mib
from mrpo_scale.config.recipe import resource
from tests.distributed.jobs import Job
from tests.tiny import pair_rows, write_models

ROUNDS, WINDOW = 5, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recipe of K=3 whose window is one micro-batch per rank of two, and pairs for six windows and a half."""
    root = tmp_path_factory.mktemp("world")
    folders = write_models(root / "models")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(26)))
    (root / "tiny.yaml").write_text(
        f"""
model_name_or_path: {folders["llama"]}
ref_models: [{folders["qwen2"]}, {folders["gpt_neox"]}]
dataset_name: {root}/pairs.jsonl
held_out: 4
baselines: [dpo]
per_device_train_batch_size: 2
gradient_checkpointing: false
learning_rate: 1.0e-3
eval_strategy: epoch
ref_weights: [0.5, 0.25, 0.25]
use_cpu: true
"""
    )
    return root


def run(jobs, world, name, *words, ranks, env=None):
    """(the JSON, what rank 0 printed)"""
    words = ["bench", "--config", world / "tiny.yaml", "--steps", ROUNDS, "--output", world / name, *words]
    (ended,) = jobs.run(Job(words, ranks=ranks, env=env or {}), timeout=240)
    assert [rank.status for rank in ended] == [0] * ranks, "\n".join(rank.err[-3000:] for rank in ended)
    assert not any("DPO live" in rank.out for rank in ended[1:])
    assert (world / name / "bench.png").stat().st_size > 20_000
    return json.loads((world / name / "bench.json").read_text()), ended[0].out


@pytest.fixture(scope="module")
def two_ranks(jobs, world):
    config = str(resource("ds_configs") / "zero3_cpu.json")
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}
    ways = ["--scoring", "live", "cached", "--placement", "spread", "partition", "--ref_shard_size", 2]
    return run(jobs, world, "out", "--references", 3, *ways, ranks=2, env=launched)


@pytest.fixture(scope="module")
def arms(two_ranks):
    return {arm["name"]: arm for arm in two_ranks[0]["arms"]}


def test_the_arms_and_what_is_said_of_each(two_ranks, arms):
    result, printed = two_ranks
    ways = ("cached", "live, spread", "live, partition")
    assert list(arms) == [f"{what} {way}" for way in ways for what in ("DPO", "MRPO K=3")]  # DPO joined unasked
    assert {"machine", "versions", "recipe", "words", "models", "settings", "rounds", "windows"} <= set(result)
    assert result["machine"]["ranks"] == 2 and result["settings"]["zero_stage"] == 3
    assert (result["rounds"], result["windows"], result["pairs_per_step"]) == (ROUNDS, ROUNDS, WINDOW)
    for name, arm in arms.items():
        assert f"\n{name} " in printed
        assert set(arm["phases"]) == set(PHASES) and [step["round"] for step in arm["steps"]] == list(range(ROUNDS))
        for figure in (arm["seconds"], *arm["phases"].values(), arm["overhead"]):
            assert figure["low"] <= figure["median"] <= figure["high"]
        assert arm["mfu"] is None and len(arm["peak_memory_gib"]) == len(arm["link_seconds"]) == 2
        assert min(arm["peak_memory_gib"]) > 0.05 and min(arm["link_seconds"]) > 0 and arm["tokens_per_second"] > 0
        assert arm["overhead"]["baseline"] == name.replace("MRPO K=3", "DPO")


def test_the_phases_of_a_step_add_up_to_it(arms):
    for arm in arms.values():
        for step in arm["steps"]:
            assert sum(step["phases"].values()) == pytest.approx(step["seconds"], abs=1e-9)
            assert min(step["phases"].values()) >= 0
            for phase in set(PHASES) - {"other"}:
                assert step["phases"][phase] > 0, phase


def test_every_arm_trains_the_same_pairs(arms):
    rows = {name: [step["rows"] for step in arm["steps"]] for name, arm in arms.items()}
    assert len({tuple(r) for r in rows.values()}) == 1
    assert len(set(rows["DPO cached"])) == ROUNDS  # a window of its own in each round
    assert all(step["pairs"] == WINDOW for arm in arms.values() for step in arm["steps"])


def test_flops_and_their_floor(arms):
    for name, arm in arms.items():
        dpo = arms[arm["overhead"]["baseline"]]
        for step, base in zip(arm["steps"], dpo["steps"], strict=True):
            assert step["flops"]["policy"] == base["flops"]["policy"] > 0
            assert (step["flops"]["references"] > 0) == ("live" in name)
        totals = [sum(s["flops"]["policy"] + s["flops"]["references"] for s in a["steps"]) for a in (arm, dpo)]
        assert arm["overhead"]["flop_floor"] == totals[0] / totals[1]
    assert arms["MRPO K=3 cached"]["overhead"]["flop_floor"] == 1
    assert 1.3 < arms["MRPO K=3 live, spread"]["overhead"]["flop_floor"] < 2
    for step in arms["DPO live, spread"]["steps"]:
        # The anchor's forward is over the policy's own batch here: a fourth of forward, forward and backward.
        assert 4 * step["flops"]["references"] == step["flops"]["useful"]


def test_bytes_gathered_are_those_of_the_references(arms, world):
    """Each of two ranks receives the half that it lacks; what FSDP pads, and the tied embedding twice, come on top."""

    def bytes_of(name):
        with safe_open(world / "models" / name / "model.safetensors", framework="pt") as tensors:
            return sum(tensors.get_tensor(key).nbytes for key in tensors.keys())  # noqa: SIM118

    gathered = {name: gathered_mib(arm) * 2**20 for name, arm in arms.items()}
    for way in ("live, spread", "cached"):
        assert gathered[f"DPO {way}"] > bytes_of("llama") / 2  # the policy, under ZeRO-3, at least once
    assert 0.99 < (gathered["DPO live, spread"] - gathered["DPO cached"]) / (bytes_of("llama") / 2) < 1.1
    others = (bytes_of("qwen2") + bytes_of("gpt_neox")) / 2
    assert 0.99 < (gathered["MRPO K=3 live, spread"] - gathered["DPO live, spread"]) / others < 1.4
    # Whole references lie on one rank: rows and scores travel, no weights.
    assert gathered["MRPO K=3 live, partition"] - gathered["DPO cached"] < others / 2
    assert abs(gathered["MRPO K=3 cached"] - gathered["DPO cached"]) < 1000


def test_one_process_without_a_launcher_on_models_and_pairs_made_up(jobs, world):
    """K=5 from three models, said so; each of them made three layers deep, with random weights."""
    made_up = ["--random_weights", "num_hidden_layers=3", "--random_pairs", 30, 20]
    words = ["--references", 5, "--repeat_references", "--scoring", "live", *made_up]
    result, printed = run(jobs, world, "one", *words, ranks=1)
    assert [arm["name"] for arm in result["arms"]] == ["DPO live, spread", "MRPO K=5 live, spread"]
    references = result["models"]["references"]
    assert [r["name"] for r in references] == ["anchor", "qwen2", "gpt_neox", "qwen2-2", "gpt_neox-2"]
    for reference in references:
        config = json.loads((Path(reference["path"]) / "config.json").read_text())
        assert config["num_hidden_layers"] == 3 and config["hidden_size"] == 32
    assert len({r["path"] for r in references}) == 3 and all("random_weights" in r["path"] for r in references)
    assert result["settings"]["zero_stage"] is None and "all_gather" not in result["arms"][0]["collectives"]
    assert result["random_pairs"] == [30, 20] and "MRPO K=5 live, spread" in printed
    # Prompt and responses of 15 to 30 and 10 to 20 tokens or so, and a template, for two pairs a step.
    assert all(2 * 35 < step["tokens"] < 2 * 110 for step in result["arms"][0]["steps"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--references", "1", "5"],
            r"`--references 5`: the recipe has 3.*qwen2.*ask for at most 3.*--repeat_references",
        ),
        (["--references", "0"], r"`--references 0`: a run has at least 1"),
        (["--steps", "1"], r"`--steps 1`: an interval needs at least 5"),
        (["--scoring", "dead"], r"mrpo bench: .*--scoring.*'dead'.*live"),
        (
            ["--random_weights", "hidden_siz=64"],
            r"`--random_weights hidden_siz=64`: no model of the recipe has `hidden_siz`",
        ),
        (["--random_weights", "64"], r"`--random_weights 64` must be KEY=NUMBER"),
        (["--placment", "spread"], r"unknown key `placment`"),
    ],
)
def test_bad_words_are_named_before_anything_loads(world, words, message):
    with pytest.raises(ConfigError, match=message) as error:
        bench(["--config", str(world / "tiny.yaml"), *words])
    assert "\n" not in str(error.value)
