"""Every outer loss of a step through a real policy: both ways through the head, one and three references, any micro-batches,
held to plain transformers' logits and the formulas of tests/loss_formulas.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mrpo_kernels.outer_losses import LOSSES
from transformers import AutoModelForCausalLM

from mrpo_scale import MRPOConfig
from mrpo_scale.objective import combine
from mrpo_scale.training.prepare import prepare_run
from mrpo_scale.training.step import micro_batches, policy_loss
from tests.loss_formulas import loss_by_formula, objective, virtual
from tests.tiny import pair_dataset, write_models

PAIRS = 4
WAYS = ("in_forward", "recompute")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its policy in float64 (but for Llama's norms, which are float32 in any model)."""
    folders = write_models(tmp_path_factory.mktemp("models"))
    args = MRPOConfig(output_dir=str(tmp_path_factory.mktemp("run")), use_cpu=True, report_to="none", max_steps=1)
    run = prepare_run(folders["llama"], [], args, pair_dataset(PAIRS), None, None, {})
    run.policy.double()
    return run


@pytest.fixture(scope="module")
def plain(run):
    """(transformers' own model, its log-probs [P, 2] with their graph, the responses' lengths [P, 2]): one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(run.plan.policy.path, dtype=torch.float64)
    logps, lengths = torch.zeros(PAIRS, 2, dtype=torch.float64), torch.zeros(PAIRS, 2)
    for pair in range(PAIRS):
        tokens = run.train[pair].tokens[0]
        for side, response in enumerate((tokens.chosen_ids, tokens.rejected_ids)):
            ids = torch.tensor([*tokens.prompt_ids, *response])
            log_softmax = model(ids[None]).logits[0, :-1].log_softmax(-1)
            predicted = log_softmax[len(tokens.prompt_ids) - 1 :]
            logps[pair, side] = predicted.gather(1, ids[len(tokens.prompt_ids) :, None]).sum()
            lengths[pair, side] = len(response)
    return model, logps, lengths


def references_of(plain, count):
    """Scores [K, P, 2] as of references that are near the policy, and not all on the same side of it."""
    noise = torch.randn(count, PAIRS, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return plain[1].detach() + 2 * noise


def by_formula(plain, name, references):
    """The mean loss and {parameter: gradient}."""
    model, logps, lengths = plain
    reference = references[0] if len(references) == 1 else virtual(references)
    loss = loss_by_formula(name, logps, reference, references[0], lengths).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return loss.detach(), dict(zip(dict(model.named_parameters()), gradients, strict=True))


def of_a_step(run, name, references, way, count):
    """The same, of ``count`` micro-batches."""
    run = replace(run, objective=objective(name))
    run.args.head_backward = way
    run.policy.zero_grad()
    window = [replace(run.train[pair], micro_batch=pair * count // PAIRS) for pair in range(PAIRS)]
    total = 0.0
    for batch in micro_batches(run, window, combine(references, run.objective)):
        _, _, share, _ = policy_loss(run, run.policy, batch, torch.tensor(float(PAIRS)))
        share.backward()
        total += share.detach()
    return total, {key: value.grad.clone() for key, value in run.policy.named_parameters()}


def distance(got, expected):
    """Of the losses, and of all gradients together, relative."""
    loss = abs(got[0] - expected[0]) / abs(expected[0])
    assert got[1].keys() == expected[1].keys()
    apart = sum((got[1][key] - expected[1][key]).square().sum() for key in expected[1]).sqrt()
    return max(loss.item(), (apart / sum(x.square().sum() for x in expected[1].values()).sqrt()).item())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_a_step_is_its_formula(run, plain, name, count):
    """To 1e-6: combined references are float32. Both ways through the head and every split into micro-batches are one to 1e-12."""
    references = references_of(plain, count)
    expected = by_formula(plain, name, references)
    assert expected[0] != 0
    first = of_a_step(run, name, references, WAYS[0], 1)
    assert distance(first, expected) < 1e-6
    for way in WAYS:
        for batches in (1, 2, 4):
            assert distance(of_a_step(run, name, references, way, batches), first) < 1e-12, (way, batches)
