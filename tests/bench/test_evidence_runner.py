"""The study's runner trains what MRPOTrainer trains, and its frozen lower layers change nothing but what trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mrpo_kernels import CombinedReferences

from benchmarks.evidence import run as evidence_run
from benchmarks.evidence.records import Scores, run_file, unpacked
from benchmarks.evidence.study import ANCHOR, OTHER, Direction, SetPlan, read_rows
from benchmarks.evidence.train import Runner, training_rows
from benchmarks.evidence.world import World, load_upper, open_world
from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.data.inputs import TRAIN_SET
from mrpo_scale.objective import Objective, combine
from tests.tiny import pair_rows, write_models

PLAN = SetPlan("pairs.jsonl", {"validation": 4, "test": 6, "final": 4, "specialists": 8, "pool": 20}, train=16)
DIRECTION = Direction("q-from-l", "qwen2", "llama", 99)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({key: row[key] for key in ("prompt", "chosen", "rejected")}) for row in pair_rows(48)]
    (folder / PLAN.file).write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def world(models: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return open_world(PLAN, DIRECTION, models, data, tmp_path_factory.mktemp("work"))


def combined_of(world: World) -> tuple[Objective, CombinedReferences]:
    objective = Objective(aggregate="geometric")
    return objective, combine(world.references((ANCHOR, OTHER)), objective)


def test_the_upper_part_of_a_policy_says_what_the_whole_says_and_alone_is_trained(world: World, tmp_path: Path) -> None:
    load_upper(world, 1, tmp_path / "hidden.pt")
    runner, everything = Runner(world), np.arange(len(world.pairs))
    torch.testing.assert_close(runner.score(everything), world.ref_logps[ANCHOR], rtol=1e-5, atol=1e-4)
    names = {name for name, p in runner.upper.policy.named_parameters() if p.requires_grad}
    assert names and all("layers.0." in name or name.endswith(".norm.weight") for name in names)
    objective, references = combined_of(world)
    rows = training_rows(world, 0, PLAN.train)
    runner.train(rows, references, objective, seed=0, learning_rate=1e-2, epochs=1)
    once = runner.score(everything)
    assert (once - world.ref_logps[ANCHOR]).abs().max() > 1e-2
    runner.train(rows, references, objective, seed=0, learning_rate=1e-2, epochs=1)
    assert torch.equal(runner.score(everything), once)  # from the starting weights again


def test_a_full_run_is_the_trainers(world: World, models: dict[str, str], data: Path, tmp_path: Path) -> None:
    """The same pairs in the same windows, the same steps: the log-probs that MRPOTrainer writes of the held-out pairs."""
    load_upper(world, 99)
    runner, (objective, references) = Runner(world), combined_of(world)
    rows = training_rows(world, 3, PLAN.train)
    runner.train(rows, references, objective, seed=3, learning_rate=1e-3, epochs=2)
    held_out = world.rows("test")
    mine = runner.score(held_out)

    rows_of_file = read_rows(data / PLAN.file)

    def texts(of: np.ndarray) -> list[dict[str, object]]:
        return [rows_of_file[world.pairs.source_row(int(row))] for row in of]

    args = MRPOConfig(
        output_dir=str(tmp_path / "run"), aggregate="geometric", learning_rate=1e-3, lr_scheduler_type="cosine", num_train_epochs=2,
        per_device_train_batch_size=8, gradient_checkpointing=False, weight_decay=0.0, seed=3, data_seed=3, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, warmup_steps=0,
    )  # fmt: skip
    trainer = MRPOTrainer(models["qwen2"], [models["llama"]], args, texts(rows), texts(held_out))
    trainer.train()
    theirs = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    start = world.ref_logps[ANCHOR][torch.from_numpy(held_out)]
    assert (theirs - start).abs().max() > 0.1
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_a_study_writes_runs_that_come_again(
    models: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_run, "commit", lambda: "none")
    names = ("dpo-anchor", "mrpo-k4", "rule-calibrated", "pre-dpo")
    found = []
    for folder in ("a", "b"):
        study = evidence_run.Study("tiny", PLAN, DIRECTION, models, data, tmp_path / "work", tmp_path / folder)
        for name in names:
            study.run(name, 0, "a command")
        found.append([json.loads(run_file(tmp_path / folder, "tiny", "q-from-l", n, 0).read_text()) for n in names])
    assert [r["margins"] for r in found[0]] == [r["margins"] for r in found[1]]
    assert set(found[0][0]["margins"]) == {"validation", "test", "final"} and set(found[0][1]["margins"]) == {"test"}
    kept = Scores.load(tmp_path / "a" / "scores" / "tiny-q-from-l.npz")
    assert kept.names == ["anchor", "other", "sft", "expert"]
    assert len(unpacked(found[0][1]["margins"]["test"])) == len(kept.rows("test")) == PLAN.parts["test"]
    assert all(np.isfinite(kept.ref_logps_KN2).ravel()) and TRAIN_SET in study.world.recipe.pair_sets
    # Scores that were made alone, with no parts, give way to those of the runs.
    path = tmp_path / "b" / "scores" / "tiny-q-from-l.npz"
    alone = replace(
        kept, names=kept.names[:2], part_N=np.full_like(kept.part_N, "pool"), ref_logps_KN2=kept.ref_logps_KN2[:2]
    )
    alone.save(path)
    for _ in range(2):
        study.keep_scores()
        assert (Scores.load(path).part_N == kept.part_N).all()
