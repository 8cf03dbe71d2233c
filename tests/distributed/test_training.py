"""Training over ranks: the same steps whatever the split, every row once, and a loss that is not finite stops everyone."""

import gc
import json
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed import comm as deepspeed_comm
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback

from benchmarks import dealing
from mrpo_scale.base.errors import ConfigError, Preempted, TrainingError
from mrpo_scale.config import hardware as hardware_module
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.recipe import resource
from mrpo_scale.lifecycle import checkpoints
from mrpo_scale.logps.micro_batches import PeerBatch
from mrpo_scale.objective import combine
from mrpo_scale.references.placement import shard_group
from mrpo_scale.training.held_out import HeldOutScores
from mrpo_scale.training.trainer import MRPOTrainer
from tests.distributed.jobs import Job
from tests.tiny import pair_dataset, pair_rows, write_models

ROWS = 19  # a last window of 4 that holds 3
TOGETHER = {"sequence_parallel_size": 2, "max_length": 512}  # of the tiny models' context


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


class Recorder(MRPOTrainer):
    """Keeps which rows were trained with weight, and what the references said of them."""

    def __init__(self, *args, **kwargs):
        self.rows, self.seen, self.poison, self.micro_batches = [], {}, None, 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, **kwargs):
        self.micro_batches += 1
        if isinstance(inputs, PeerBatch):
            return super().compute_loss(model, inputs, **kwargs)
        for i, (row, weight) in enumerate(zip(inputs.rows, inputs.weight_P.tolist(), strict=True)):
            if weight:
                self.rows.append((self.state.global_step, row))
                self.seen[row] = inputs.references.ref_logps_KP2[:, i].clone()
                if row == self.poison:
                    inputs.references.ref_logps_KP2[0, i, 0] = torch.nan
                    references = combine(inputs.references.ref_logps_KP2, self.preference_objective)
                    inputs = replace(inputs, references=references)
        return super().compute_loss(model, inputs, **kwargs)


def train(folders, output_dir, *, batch_size, accumulation, deepspeed=True, poison=None, resume=None, **keys):
    """Two epochs of K=3 MRPO; {log, rows trained here, scores, ...}. Runs in a worker of a pool or in this process."""
    if dist.is_initialized():
        deepspeed_comm.init_distributed(
            dist_backend="gloo"
        )  # joins the pool's group; under a launcher accelerate does it
    if not deepspeed:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # of a run before, in the same worker
    config = MRPOConfig(
        output_dir=str(output_dir),
        deepspeed=str(resource("ds_configs") / "zero3_cpu.json") if deepspeed else None,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **{
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "seed": 5,
            "use_cpu": True,
            "disable_tqdm": True,
            **keys,
        },
    )
    trainer = Recorder(
        folders["llama"],
        ref_models=[folders["qwen2"], folders["gpt_neox"]],
        args=config,
        train_dataset=pair_dataset(ROWS),
        eval_dataset=pair_dataset(7, seed=1),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.poison = poison
    try:
        trainer.train(resume)
        held_out = trainer.evaluate()
        trainer.save_model()
    finally:
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
        AcceleratorState._reset_state()
        gc.collect()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    scores = {row: value.tolist() for row, value in trainer.seen.items()}
    stage = config.deepspeed_plugin.zero_stage if config.deepspeed_plugin else None
    weights = trainer.preference_objective.ref_weights
    return {
        "log": log,
        "rows": trainer.rows,
        "micro_batches": trainer.micro_batches,
        "scores": scores,
        "held_out": held_out,
        "stage": stage,
        "weights": weights,
    }


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    return train(folders, tmp_path_factory.mktemp("alone"), batch_size=1, accumulation=4, deepspeed=False)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "keys"),
    [
        (1, 2, {"head_backward": "in_forward"}),
        (2, 1, {"head_backward": "recompute"}),
        (2, 1, {"max_tokens_per_micro_batch": 60}),
        (1, 2, {"max_tokens_per_micro_batch": 60, "deepspeed": False}),
        (1, 2, {"max_tokens_per_micro_batch": 10_000}),
        (1, 2, {**TOGETHER, "gradient_checkpointing": True, "activation_offloading": True}),
    ],
    ids=["accumulate", "larger-batch", "token-budget", "token-budget-ddp", "one-micro-batch", "sequence-parallel"],
)
def test_two_ranks_take_the_steps_of_one(folders, tmp_path, pool2, alone, batch_size, accumulation, keys):
    """1 process x accumulation 4 = 2 processes x accumulation 2 = 2 processes x 2 pairs = micro-batches of so many tokens, more or
    fewer than the loader's batches = each micro-batch over both ranks; under ZeRO-3 and under DDP, with a ragged tail."""
    ranks = pool2.run(train, folders, tmp_path, batch_size=batch_size, accumulation=accumulation, **keys, timeout=300)
    assert ranks[0]["stage"] == (3 if keys.get("deepspeed", True) else None)
    steps = len(ranks[0]["log"])
    budget = keys.get("max_tokens_per_micro_batch")
    turns = keys.get("sequence_parallel_size", 1)  # the ranks of a sequence group compute all of its micro-batches
    expected = {None: {turns * accumulation * steps}, 10_000: {steps}}.get(budget, set(range(steps + 1, 2 * steps + 1)))
    assert ranks[0]["micro_batches"] == ranks[1]["micro_batches"] and ranks[0]["micro_batches"] in expected
    assert len(ranks[0]["log"]) == len(alone["log"]) == 10
    for entry, expected in zip(ranks[0]["log"], alone["log"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "references/qwen2/weight"):
            # A margin is beta times a small difference of log-probs about 200 in size: a few units of their last digit.
            slack = 4 * 0.1 * 200 * torch.finfo(torch.float32).eps if key == "rewards/margins" else 1e-7
            assert entry[key] == pytest.approx(expected[key], rel=1e-5, abs=slack), (entry["step"], key)
    for key in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_anchor/rewards/margins"):
        assert ranks[0]["held_out"][key] == pytest.approx(alone["held_out"][key], rel=1e-4, abs=1e-6), key
    trained = sorted(ranks[0]["rows"] + ranks[1]["rows"])
    for epoch in (range(5), range(5, 10)):
        assert sorted(row for step, row in trained if step in epoch) == list(range(ROWS))
    assert {step: {r for s, r in trained if s == step} for step in range(10)} == {
        step: {r for s, r in alone["rows"] if s == step} for step in range(10)
    }
    for rank in ranks:
        for row, score in rank["scores"].items():
            torch.testing.assert_close(torch.tensor(score), torch.tensor(alone["scores"][row]), rtol=1e-5, atol=1e-5)


def in_both_orders(folders, output_dir):
    """This rank's steps of three windows, each dealt by chance and by length, with the same weights."""
    deepspeed_comm.init_distributed(dist_backend="gloo")
    zero = str(resource("ds_configs") / "zero3_cpu.json")
    config = dealing.config_of(Path(output_dir), pairs=2, micro_batches=2, windows=3, deepspeed=zero)
    trainer = dealing.Paired(folders["llama"], args=config, train_dataset=pair_dataset(24))
    trainer.remove_callback(PrinterCallback)
    try:
        return dealing.both_orders(trainer)
    finally:
        settle(trainer)


def test_loss_and_gradient_do_not_depend_on_who_computes_a_pair(folders, tmp_path, pool2):
    ranks = pool2.run(in_both_orders, folders, tmp_path, timeout=300)
    found = dealing.summarise(ranks)
    assert found["windows"] == 3 and found["largest_relative_difference"] < 1e-6
    assert found["efficiency"]["dealt"] > max(0.9, found["efficiency"]["drawn"])


def test_every_row_once_in_one_process(alone):
    assert alone["stage"] is None
    for epoch in (range(5), range(5, 10)):
        assert sorted(row for step, row in alone["rows"] if step in epoch) == list(range(ROWS))


def train_expecting_a_stop(folders, output_dir):
    """Returns what the rank raised, and whether it is still in step with the others afterwards."""
    try:
        train(folders, output_dir, batch_size=2, accumulation=1, poison=11, save_strategy="steps", save_steps=1)
    except TrainingError as error:
        dist.barrier()
        return str(error)
    return None


def test_a_loss_that_is_not_finite_stops_all_ranks(folders, tmp_path, pool2, alone):
    step = next(step for step, row in alone["rows"] if row == 11)
    messages = pool2.run(train_expecting_a_stop, folders, tmp_path, timeout=300)
    assert messages[0] == messages[1] and messages[0] is not None
    assert f"step {step + 1} " in messages[0] and ": row 11 " in messages[0] and str(tmp_path) in messages[0]
    # The last good checkpoint is there and none of the bad step's.
    assert sorted(int(p.name.split("-")[1]) for p in Path(tmp_path).glob("checkpoint-*")) == list(range(1, step + 1))


@pytest.mark.parametrize("name", ["zero3_cpu", "the file"])
def test_deepspeed_in_the_recipe_without_a_launcher(folders, tmp_path, jobs, name):
    """A world of one, as under a launcher of one process, instead of a search for MPI."""
    path = str(resource("ds_configs") / "zero3_cpu.json")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(8)))
    recipe = {
        "model_name_or_path": folders["llama"],
        "ref_models": [folders["qwen2"]],
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "deepspeed": path if name == "the file" else name,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "report_to": None,
        "save_strategy": False,
        "gradient_checkpointing": False,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ((ended,),) = jobs.run(Job(["train", "--config", str(tmp_path / "recipe.yaml")]))
    assert ended.status == 0, ended.err
    assert "world size 1, DeepSpeed ZeRO stage 3" in ended.err and "without a launcher" in ended.err


def test_a_poisoned_row_is_named_in_one_process(folders, tmp_path):
    with pytest.raises(TrainingError, match="rank 0: row 11 "):
        train(folders, tmp_path, batch_size=4, accumulation=1, poison=11, deepspeed=False)


def pair_scoring_in_unequal_batches(folders):
    """Scoring when ranks need different numbers of forwards: rank 1 has one short pair, rank 0 several long ones."""
    from mrpo_scale.data.tokenization import PairTokens
    from mrpo_scale.data.window import PairExample
    from mrpo_scale.logps.pair_batch import collate_pairs
    from mrpo_scale.references.live import Reference, SpreadScorer
    from mrpo_scale.references.sharding import ReferenceSource, ShardedReference

    rank = dist.get_rank()
    device = torch.device("cpu")
    group = shard_group(2)
    model = ShardedReference(ReferenceSource("anchor", folders["llama"]), group, device)
    lengths = [(3, 9, 4), (5, 2, 30), (8, 8, 8), (2, 3, 4)] if rank == 0 else [(1, 1, 2)]
    pairs = [PairTokens([9] * a, [10] * b, [11] * c) for a, b, c in lengths]
    examples = [PairExample(i, 1.0, (pair,)) for i, pair in enumerate(pairs)]
    before = model.gathers
    references = {0: Reference("anchor", model, 0, 0)}
    many = SpreadScorer(references, tokens_per_forward=20)
    scores_KP2 = many.score(examples, None, [0])
    forwards = model.gathers - before
    one = SpreadScorer(references, tokens_per_forward=10**6)
    before = model.gathers
    together_KP2 = one.score(examples, None, [0])
    assert model.gathers - before == 1, "a window is one forward, so one gather, unless memory asks for more"
    single = torch.cat(
        [model.score(collate_pairs([pairs[min(i, len(pairs) - 1)]], shared_prompt=True)) for i in range(4)]
    )
    torch.testing.assert_close(scores_KP2[0], single[: len(pairs)], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together_KP2[0], single[: len(pairs)], rtol=1e-5, atol=1e-5)
    return forwards


def live_step_of_three(folders, shard_size):
    """One window scored by K=3: (calls of virtual_reference, gathers per reference, scores, scores one by one)."""
    from mrpo_scale.data.tokenization import PairTokens
    from mrpo_scale.data.window import PairExample
    from mrpo_scale.logps.pair_batch import collate_pairs
    from mrpo_scale.objective import Objective
    from mrpo_scale.references import live as scoring
    from mrpo_scale.references.sharding import ReferenceSource, ShardedReference

    calls = []
    fused = scoring.virtual_reference

    def counted(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    device, group = torch.device("cpu"), shard_group(shard_size)
    references = [
        scoring.Reference(name, ShardedReference(ReferenceSource(name, folder), group, device), view, 0)
        for view, (name, folder) in enumerate(folders.items())
    ]
    lengths = [(3, 9, 4), (5, 2, 30), (8, 8, 8), (2, 3, 4)]
    # Every model reads other tokens, and more of them: the lengths differ between references.
    examples = [
        PairExample(i, 1.0, tuple(PairTokens([9 + v] * a, [10] * (b + v), [11] * (c + 2 * v)) for v in range(3)))
        for i, (a, b, c) in enumerate(lengths)
    ]
    scorer = scoring.SpreadScorer(dict(enumerate(references)), tokens_per_forward=10**6)
    scoring.virtual_reference = counted
    try:
        before = [r.model.gathers for r in references]
        scores_KP2 = scorer.combined(examples, None, [0, 1, 2], Objective()).ref_logps_KP2
        gathers = [r.model.gathers - b for r, b in zip(references, before, strict=True)]
    finally:
        scoring.virtual_reference = fused
    assert torch.equal(scorer.score(examples, None, [0, 1, 2]), scores_KP2), "scores alone have the same bits"
    alone = [
        r.model.score(collate_pairs([e.tokens[r.tokenization] for e in examples], shared_prompt=r.model.shared_prompt))
        for r in references
    ]
    return len(calls), gathers, scores_KP2.tolist(), torch.stack(alone).tolist()


@pytest.mark.parametrize("shard_size", [1, 2])
def test_a_live_window_is_one_virtual_reference_call(folders, pool2, shard_size):
    """K=3: one call, one gather of each body, and the log-probs of scoring the references one by one."""
    for calls, gathers, scores, alone in pool2.run(live_step_of_three, folders, shard_size):
        assert calls == 1
        assert gathers == [1, 1, 1]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(alone), rtol=1e-6, atol=1e-6)


def test_ranks_with_less_to_score_stay_in_step(folders, pool2):
    forwards = pool2.run(pair_scoring_in_unequal_batches, folders)
    assert forwards[0] == forwards[1] > 1


def test_validation_weights_and_held_out_pairs_over_ranks(folders, tmp_path, pool2):
    """7 held-out pairs, 4 set aside, batches of 2: one rank has a filler in each set, which counts for nothing."""
    keys = {"ref_weights": "validation", "max_steps": 1, "per_device_eval_batch_size": 2}
    one = train(folders, tmp_path / "one", batch_size=2, accumulation=1, deepspeed=False, **keys)
    ranks = pool2.run(train, folders, tmp_path / "two", batch_size=1, accumulation=1, **keys, timeout=300)
    assert ranks[0]["weights"] == ranks[1]["weights"] == one["weights"]
    assert sum(one["weights"]) == pytest.approx(1)
    kept = [HeldOutScores.load(tmp_path / name / "eval_logps.npz") for name in ("one", "two")]
    assert len(kept[0].row_keys) == 3
    assert kept[0].row_keys.tolist() == kept[1].row_keys.tolist()
    assert kept[1].policy_logps_N2 == pytest.approx(kept[0].policy_logps_N2, rel=1e-5)
    assert kept[1].ref_logps_KN2 == pytest.approx(kept[0].ref_logps_KN2, rel=1e-5)


def settle(trainer):
    """Let go of a trainer, so that the next one in this process starts clean."""
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    AcceleratorState._reset_state()
    gc.collect()


def held_out_files(folder):
    scores = HeldOutScores.load(Path(folder) / "eval_logps.npz")
    return scores.policy_logps_N2.tolist(), scores.ref_logps_KN2.tolist()


def best_step(folders, output_dir, deepspeed=True, **keys):
    """Train until well past the best step, save, and say everything that a run reports; once more from a late checkpoint."""
    made = []
    for folder, resume in ((output_dir, None), (Path(output_dir) / "again", "auto")):
        if resume and (not dist.is_initialized() or dist.get_rank() == 0):
            shutil.copytree(Path(output_dir) / "checkpoint-4", folder / "checkpoint-4")
        if dist.is_initialized():
            dist.barrier()
        trainer = made_trainer(
            folders, folder, deepspeed, learning_rate=3e-2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, max_steps=5, load_best_model_at_end=True, metric_for_best_model="loss", **keys,
        )  # fmt: skip
        trainer.train(resume)
        trainer.save_model()
        trainer.create_model_card()
        facts = json.loads((Path(folder) / "run.json").read_text()) if dist_rank() == 0 else None
        made.append(
            {
                "best": trainer.state.best_global_step,
                "checkpoint": trainer.state.best_model_checkpoint,
                "results": {k: v for k, v in trainer.results.items() if not k.endswith(("_runtime", "_per_second"))},
                "log": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
                "facts": facts,
                "npz": held_out_files(folder) if dist_rank() == 0 else None,
            }
        )
        settle(trainer)
    return made


def train_in_bf16(folders, output_dir):
    """Four steps, and the last two again from the checkpoint; each run's log and this rank's float32 master weights."""
    made = []
    for folder, resume in ((output_dir, None), (Path(output_dir) / "again", "auto")):
        if resume and dist_rank() == 0:
            shutil.copytree(Path(output_dir) / "checkpoint-2", folder / "checkpoint-2")
        dist.barrier()
        keys = {"bf16": True, "use_cpu": False, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = made_trainer(folders, folder, deepspeed=True, **keys)
        assert trainer.args.device.type == "cpu" and trainer.policy.dtype == torch.bfloat16
        trainer.train(resume)
        master = torch.cat([part.flatten() for part in trainer.deepspeed.optimizer.fp32_partitioned_groups_flat])
        log = [
            {k: v for k, v in entry.items() if not k.startswith(("time/", "tokens_per"))}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        made.append({"log": log, "master": master.clone()})
        settle(trainer)
    return made


def test_bf16_on_cpus_under_zero3_resumes_to_the_same_bits(folders, tmp_path, pool2):
    for whole, again in pool2.run(train_in_bf16, folders, tmp_path, timeout=300):
        assert whole["master"].dtype == torch.float32
        assert (whole["master"] != whole["master"].bfloat16().float()).any(), (
            "more digits than the weights that compute"
        )
        assert torch.equal(whole["master"], again["master"])
        assert len(whole["log"]) == 4 and whole["log"] == again["log"]


def choose_bf16_apart():
    """Rank 1's processor pretends to have no instructions for bf16; what each rank raises."""
    has = "AMX" if dist_rank() == 0 else None
    hardware_module.bf16_instructions, kept = lambda: has, hardware_module.bf16_instructions
    try:
        MRPOConfig(output_dir="/nowhere", report_to="none", use_cpu=True, bf16="auto")
    except ConfigError as error:
        return str(error)
    finally:
        hardware_module.bf16_instructions = kept
    return None


def test_processors_that_differ_are_told_apart(pool2):
    said = pool2.run(choose_bf16_apart, timeout=60)
    assert said[0] == said[1] and "rank 0 has bf16 in hardware, that of rank 1 has not" in said[0]


def dist_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def made_trainer(folders, output_dir, deepspeed, ds_config="zero3_cpu.json", **keys):
    if dist.is_initialized():
        deepspeed_comm.init_distributed(dist_backend="gloo")
    config = MRPOConfig(
        output_dir=str(output_dir),
        deepspeed=str(resource("ds_configs") / ds_config) if deepspeed is True else deepspeed or None,
        **{
            "per_device_train_batch_size": 4 if not dist.is_initialized() else 2,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "seed": 5,
            "use_cpu": True,
            "disable_tqdm": True,
            **keys,
        },
    )
    trainer = MRPOTrainer(folders["llama"], [folders["qwen2"]], config, pair_dataset(ROWS), pair_dataset(7, seed=1))
    trainer.remove_callback(PrinterCallback)
    return trainer


def says_the_best_step(made, output_dir):
    """What is reported is the best step's, in every place, to the bit, and is measured on the weights that are saved."""
    first = made[0]
    assert first["best"] < 5, "the last step is the best: the test shows nothing"
    logged = next(entry for entry in first["log"] if entry["step"] == first["best"])
    last = next(entry for entry in first["log"] if entry["step"] == 5)
    for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_logps/accuracies"):
        assert first["results"][key] == logged[key], key
    assert first["results"]["eval_loss"] < last["eval_loss"]
    assert [entry["step"] for entry in first["log"]] == [1, 2, 3, 4, 5], "the log is that of the training"
    assert first["facts"]["settings"]["weights of step"] == first["best"]
    saved, best = (load_file(Path(folder) / "model.safetensors") for folder in (output_dir, first["checkpoint"]))
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    card = (Path(output_dir) / "README.md").read_text()
    assert f"| `rewards/margins` | {logged['eval_rewards/margins']:.4g} |" in card
    # eval_logps.npz is of the saved weights: its mean is the metric that was logged at that step.
    chosen = statistics.mean(chosen for chosen, _ in first["npz"][0])
    assert chosen == pytest.approx(logged["eval_logps/chosen"], rel=1e-6)
    assert chosen != pytest.approx(last["eval_logps/chosen"], rel=1e-4)
    # A run that goes on after the best step ends with the same.
    assert made[1]["results"] == first["results"] and made[1]["npz"] == first["npz"]


def test_what_is_reported_is_measured_on_the_best_step_under_zero3(folders, tmp_path, pool2):
    made = pool2.run(best_step, folders, tmp_path, timeout=300)
    says_the_best_step(made[0], tmp_path)
    assert made[1][0]["results"] == made[0][0]["results"]


def test_what_is_reported_is_measured_on_the_best_step(folders, tmp_path):
    says_the_best_step(best_step(folders, tmp_path, deepspeed=False), tmp_path)


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KilledError


class Stop(TrainerCallback):
    """Asks for a stop, as a person does, amid step 3."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and dist_rank() == 0:
            (Path(args.output_dir) / "STOP").touch()


def only_models(folders, output_dir, deepspeed=True):
    """Weights of: an undisturbed run; one that was killed amid checkpoints of the model only; one that was asked to stop."""
    keys = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 5, "save_total_limit": 2}
    weights, seen = {}, {}
    for name, callback in (("whole", None), ("killed", Kill()), ("stopped", Stop())):
        for attempt in (1, 2) if callback else (1,):
            trainer = made_trainer(folders, Path(output_dir) / name, deepspeed, **keys)
            if callback and attempt == 1:
                trainer.add_callback(callback)
            try:
                trainer.train("auto")
            except (KilledError, Preempted):
                seen[name] = [(c.step, c.lacks) for c in checkpoints.find_complete(trainer.args.folder)[0]]
            else:
                seen[f"{name} began at"] = trainer._initial_global_step
            if dist.is_initialized():
                dist.barrier()
            if name == "killed" and attempt == 1:
                try:
                    trainer.train(str(trainer.args.folder / "checkpoint-3"))
                except ConfigError as error:
                    seen["asked for"] = str(error)
            if not callback or attempt == 2:
                trainer.save_model()
            settle(trainer)
        if dist_rank() == 0:
            weights[name] = load_file(Path(output_dir) / name / "model.safetensors")
    same = {name: all(torch.equal(weights[name][k], weights["whole"][k]) for k in weights[name]) for name in weights}
    return seen, same


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_the_model_only_is_not_gone_on_from(folders, tmp_path, request, ranks):
    """`save_only_model`: a killed run starts anew instead of going on without Adam's state; a stop saves everything."""
    if ranks == 1:
        seen, same = only_models(folders, tmp_path, deepspeed=False)
    else:
        seen, same = request.getfixturevalue("pool2").run(only_models, folders, tmp_path, timeout=300)[0]
    assert same == {"whole": True, "killed": True, "stopped": True}
    assert seen["killed"] == [(2, seen["killed"][0][1]), (3, seen["killed"][0][1])] and seen["killed"][0][1]
    assert seen["killed began at"] == 0 and seen["stopped began at"] == 3
    assert seen["stopped"][-1] == (3, None), "what a stop saves can be gone on from"
    assert "checkpoint-3` does not hold" in seen["asked for"] and "save_only_model" in seen["asked for"]


def weights_of_zero3_without_gathering(folders, output_dir, ds_config):
    trainer = made_trainer(folders, output_dir, ds_config, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    settle(trainer)


@pytest.mark.parametrize("setting", [{"stage3_gather_16bit_weights_on_model_save": False}, {}], ids=["false", "unset"])
def test_weights_are_saved_whatever_the_deepspeed_file_says(folders, tmp_path, pool2, setting):
    file = json.loads((resource("ds_configs") / "zero3_cpu.json").read_text())
    del file["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    file["zero_optimization"] |= setting
    (tmp_path / "ds.json").write_text(json.dumps(file))
    pool2.run(weights_of_zero3_without_gathering, folders, tmp_path / "out", str(tmp_path / "ds.json"), timeout=300)
    source = load_file(Path(folders["llama"]) / "model.safetensors")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == source.keys()
        assert any(not torch.equal(saved[name], source[name]) for name in saved)
