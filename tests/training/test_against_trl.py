"""The losses of a step with one reference against TRL's own DPOTrainer: the same models, the same tokens, float64.

Needs the extra `bench`, in a version of TRL that has all of these losses (1.16 was compared).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from mrpo_kernels.outer_losses import LOSSES
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale import MRPOConfig
from mrpo_scale.objective import combine
from mrpo_scale.training.prepare import prepare_run
from mrpo_scale.training.step import micro_batches, policy_loss
from tests.loss_formulas import BETA, TAU, objective
from tests.tiny import pair_rows, write_models
from tests.tools import module_of_extra

trl = module_of_extra("trl", "bench")

PAIRS = 6
BOTH = [name for name in LOSSES if name != "ipo_whole"]  # which is of this project only


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """(this project's run, TRL's trainer): a policy, and a reference near it."""
    root = tmp_path_factory.mktemp("world")
    policy = write_models(root)["llama"]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model, reference = (AutoModelForCausalLM.from_pretrained(policy).double() for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    keys = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    args = MRPOConfig(output_dir=str(root / "run"), **keys)
    # Short responses, whose float32 sums are exact enough.
    rows = sorted(pair_rows(200), key=lambda row: len(row["chosen"][0]["content"] + row["rejected"][0]["content"]))
    rows = Dataset.from_list(rows[:PAIRS])
    run = prepare_run(policy, [], args, rows, None, None, {})
    run.policy.double()
    theirs = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(root / "trl"), beta=BETA, discopop_tau=TAU, **keys),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    return run, theirs


@pytest.fixture(scope="module")
def window(trainers):
    return [trainers[0].train[row] for row in range(PAIRS)]


def of_trl(theirs, batches, name):
    """Loss and gradients of micro-batches of one pair: over several of them `sft` is a mean over tokens there."""
    theirs.loss_types, theirs.loss_weights = [name], [1.0]
    theirs.label_smoothing = objective(name).label_smoothing
    theirs.model.zero_grad()
    loss = sum(theirs._compute_loss(theirs.model, batch, return_outputs=False) for batch in batches) / PAIRS
    loss.backward()
    return loss.item(), {key: value.grad for key, value in theirs.model.named_parameters()}


def of_this(run, window, references, name):
    run = replace(run, objective=objective(name))
    (batch,) = micro_batches(run, window, combine(references, run.objective))
    run.policy.zero_grad()
    _, _, share, _ = policy_loss(run, run.policy, batch, torch.tensor(float(PAIRS)))
    share.backward()
    return share.item(), {key: value.grad for key, value in run.policy.named_parameters()}


@pytest.mark.parametrize("head_backward", ["in_forward", "recompute"])
@pytest.mark.parametrize("name", BOTH)
def test_a_loss_is_that_of_trl(trainers, window, name, head_backward):
    """Losses to 1e-6, gradients to 1e-5: TRL's head adds up in float32."""
    run, theirs = trainers
    run.args.head_backward = head_backward
    batches = [theirs.data_collator([vars(example.tokens[0])]) for example in window]
    scores = [theirs.compute_ref_log_probs(theirs.ref_model, batch) for batch in batches]
    references = torch.stack([torch.cat(pair) for pair in scores])[None]
    loss, gradients = of_this(run, window, references, name)
    their_loss, their_gradients = of_trl(theirs, batches, name)
    assert loss == pytest.approx(their_loss, rel=1e-6)
    apart = sum((gradients[key] - expected).square().sum() for key, expected in their_gradients.items())
    whole = sum(expected.square().sum() for expected in their_gradients.values())
    print(f"{name} {head_backward}: {loss:.7f}, TRL {their_loss:.7f}; gradients apart by {(apart / whole).sqrt():.1e}")
    assert apart / whole < 1e-5**2
