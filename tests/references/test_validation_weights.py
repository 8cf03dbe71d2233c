"""`ref_weights: validation`: what the weights are, which pairs they come from, and that those are used for nothing else."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.inputs import WEIGHTS_SET
from mrpo_scale.objective import Objective, preference_loss
from mrpo_scale.references.validation_weights import validation_weights
from mrpo_scale.training.held_out import HeldOutScores
from tests.tiny import pair_dataset, write_models


def logps(*right_KN):
    """[K, N, 2]: chosen one nat above rejected where right, one below where wrong, level where None."""
    margins = [[{True: 1.0, False: -1.0, None: 0.0}[right] for right in row] for row in right_KN]
    return torch.stack([torch.tensor(margins) - 10, torch.full((len(margins), len(margins[0])), -10.0)], dim=-1)


def test_weights_grow_with_the_share_above_chance():
    """Right on 4, 3 and 1 of 4 pairs: above chance by 1/2, 1/4 and nothing."""
    ranks = [[True] * 4, [True, True, True, False], [True, False, False, False]]
    assert validation_weights(logps(*ranks), "abc") == pytest.approx((2 / 3, 1 / 3, 0))


def test_a_tie_is_not_right():
    assert validation_weights(logps([True, True, None, None], [True, True, True, None]), "ab") == pytest.approx((0, 1))


def test_without_a_reference_above_chance_all_weigh_alike(caplog):
    with caplog.at_level(logging.WARNING):
        assert validation_weights(logps([True, False], [False, False]), "ab") == (0.5, 0.5)
    assert "a 50.0%; b 0.0%" in caplog.text and "chance" in caplog.text


def test_the_word_never_reaches_a_loss():
    with pytest.raises(ValueError, match="validation"):
        preference_loss(torch.zeros(1, 2), torch.zeros(2, 1, 2), Objective(ref_weights="validation"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def config(folder, **keys):
    fixed = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_checkpointing": False}
    fixed |= {
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return MRPOConfig(output_dir=str(folder), **{**fixed, **keys})


def test_weights_come_from_pairs_that_nothing_else_sees(folders, tmp_path):
    """11 held-out pairs, 5 set aside: an odd number, more than a batch of 4, so that a filler has to count for nothing."""
    args = config(
        tmp_path / "mrpo", ref_weights="validation", weights_split=0.45, ref_cache_dir=str(tmp_path / "cache")
    )
    trainer = MRPOTrainer(folders["llama"], [folders["qwen2"]], args, pair_dataset(8), pair_dataset(11, seed=1))
    keys = {split: set(pairs.row_keys.tolist()) for split, pairs in trainer.pair_sets.items()}
    assert [len(keys[split]) for split in ("train", "eval", WEIGHTS_SET)] == [8, 6, 5]
    assert not keys["eval"] & keys[WEIGHTS_SET]
    stored = [store.lookup(trainer.pair_sets[WEIGHTS_SET].row_keys) for store in trainer.scores.stores]
    assert all(scores.found_N.all() for scores in stored)
    right = np.array([(scores.logps_N2[:, 0] > scores.logps_N2[:, 1]).mean() for scores in stored])
    above = np.maximum(right - 0.5, 0)
    expected = above / above.sum() if above.sum() else np.full(2, 0.5)
    assert trainer.preference_objective.ref_weights == pytest.approx(tuple(expected))
    trainer.train()
    assert trainer.state.log_history[0]["references/qwen2/weight"] == pytest.approx(expected[1])
    # DPO beside it is measured on the same pairs.
    dpo = MRPOTrainer(
        folders["llama"],
        [folders["qwen2"]],
        config(tmp_path / "dpo", ref_weights="validation", weights_split=0.45, objective="dpo"),
        pair_dataset(8),
        pair_dataset(11, seed=1),
    )
    assert set(dpo.pair_sets["eval"].row_keys.tolist()) == keys["eval"]


@pytest.mark.parametrize("held_out", [None, "several"])
def test_it_needs_one_held_out_set(held_out, folders, tmp_path):
    sets = None if held_out is None else {"a": pair_dataset(4, 1), "b": pair_dataset(4, 2)}
    with pytest.raises(ConfigError, match=r"ref_weights: validation.*held-out"):
        MRPOTrainer(folders["llama"], [], config(tmp_path, ref_weights="validation"), pair_dataset(8), sets)


def test_dpo_keeps_the_pairs_that_every_model_can_score(folders, tmp_path):
    """A reference with a context of 100 tokens drops rows for all; DPO, which does not load it, must drop them too."""
    short = tmp_path / "short"
    shutil.copytree(folders["qwen2"], short)
    written = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**written, "max_position_embeddings": 100}))
    sets = {}
    for name, objective, anchor in (
        ("mrpo", "mrpo", None),
        ("dpo", "dpo", None),
        ("other", "dpo", folders["gpt_neox"]),
    ):
        args = config(tmp_path / name, objective=objective, anchor=anchor, max_bad_rows=0.9)
        trainer = MRPOTrainer(folders["llama"], [str(short)], args, pair_dataset(16), pair_dataset(8, seed=1))
        sets[name] = {split: pairs.row_keys.tolist() for split, pairs in trainer.pair_sets.items()}
        assert len(trainer.plan.references) == (2 if objective == "mrpo" else 1)
    assert sets["mrpo"] == sets["dpo"] == sets["other"]
    assert 0 < len(sets["dpo"]["train"]) < 16


def test_what_is_kept_of_the_held_out_pairs(folders, tmp_path):
    """The file's pairs give the very metrics that were logged; 7 pairs in batches of 4 have a filler."""
    trainer = MRPOTrainer(
        folders["llama"], [folders["qwen2"]], config(tmp_path), pair_dataset(8), pair_dataset(7, seed=1)
    )
    trainer.train()
    metrics = trainer.evaluate()
    kept = HeldOutScores.load(Path(tmp_path) / "eval_logps.npz")
    assert kept.names == ["anchor", "qwen2"]
    assert kept.row_keys.tolist() == sorted(trainer.pair_sets["eval"].row_keys.tolist())
    assert kept.policy_logps_N2[:, 0].mean() == pytest.approx(metrics["eval_logps/chosen"], rel=1e-6)
    accuracy = (kept.policy_logps_N2[:, 0] > kept.policy_logps_N2[:, 1]).mean()
    assert accuracy == pytest.approx(metrics["eval_logps/accuracies"])
    rewards = 0.1 * (kept.policy_logps_N2 - kept.ref_logps_KN2[0])
    assert (rewards[:, 0] - rewards[:, 1]).mean() == pytest.approx(metrics["eval_anchor/rewards/margins"], abs=1e-6)
