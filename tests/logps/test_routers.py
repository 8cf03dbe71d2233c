"""The auxiliary loss of mixtures of experts: transformers' own, on the batches that are trained."""

import pytest
import torch

from benchmarks.sweep_models import PAIRS
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, preference_step, score_pairs_and_routers
from mrpo_scale.logps.routers import has_router_loss, router_loss_coef
from tests.tiny import checkpoint_activations
from tests.tiny_types import tiny_model

TYPES = ["mixtral", "qwen3_moe", "qwen3_5_moe", "gpt_oss", "olmoe", "minimax_m2", "jamba", "granitemoe"]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_it_is_the_models_own(model_type):
    """The same rows, padding left out, value and gradients, with activation checkpointing as in training."""
    model = tiny_model(model_type).train()
    pairs = collate_pairs(PAIRS, shared_prompt=False)
    mask_BL = (pairs.segment_BL >= 0).long()
    own = model(
        input_ids=pairs.input_ids_BL, attention_mask=mask_BL, output_router_logits=True, use_cache=False
    ).aux_loss
    own.backward()
    expected = gradients(model)
    enable_pair_scoring(model, "policy")
    checkpoint_activations(model)
    _, balance = score_pairs_and_routers(model, pairs)
    torch.testing.assert_close(balance.loss, own)
    balance.loss.backward()
    got = gradients(model)
    assert any("router" in name or "gate" in name for name in got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7)
    scored, balance = preference_step(model, pairs, lambda logps_C2, _: logps_C2.sum(-1), with_routers=True)
    torch.testing.assert_close(balance.loss, own)
    assert scored.policy_logps_P2.shape == (len(PAIRS), 2)


@torch.no_grad()
def test_busiest_and_idle():
    """All tokens to the first two of four experts: the busiest has twice what is even, half of the experts have none."""
    model = tiny_model("mixtral")
    enable_pair_scoring(model, "policy")
    for name, parameter in model.named_parameters():
        if "mlp.gate" in name:
            parameter.zero_()  # ties go to the first experts
    _, balance = score_pairs_and_routers(model, collate_pairs(PAIRS, shared_prompt=False))
    assert balance.busiest == 2 and balance.idle == 0.5


def test_what_the_config_says_is_the_default():
    model = tiny_model("olmoe")
    assert router_loss_coef(model, None) == model.config.router_aux_loss_coef > 0
    assert router_loss_coef(model, 0.5) == 0.5 and router_loss_coef(model, 0.0) == 0
    model.config.router_aux_loss_coef = 0.0
    assert router_loss_coef(model, None) == 0


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "doge"])
def test_who_has_none(model_type):
    model = tiny_model(model_type)
    assert not has_router_loss(type(model)) and router_loss_coef(model, None) == 0
