"""FLOPs from a config against torch's own counter over the real forward and backward."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.flops import (
    NO_WORK,
    UnitCosts,
    Work,
    active_parameters,
    forward_flops,
    total_work,
    training_flops,
    unit_costs,
    work_of_batch,
    work_of_lengths,
)
from mrpo_scale.logps.pair_batch import _visible, collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, preference_step, score_pairs
from mrpo_scale.logps.span_attention import SPAN_ATTENTION
from mrpo_scale.logps.varlen_layout import varlen_layout
from mrpo_scale.models.plan import disable_dropout
from tests.tiny import checkpoint_activations
from tests.tiny_types import tiny_model

SIZES = {
    "vocab_size": 307,  # odd on purpose: nothing may be rounded
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # heads wider than hidden_size / heads
    "gemma3_text": {"head_dim": 24, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "gemma2": {"head_dim": 24, "final_logit_softcapping": 30.0},
    "cohere": {"num_key_value_heads": 6},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 6},
    "gpt2": {},  # its linear layers are Conv1D, and it takes two sequences per pair
}
PAIRS = [
    PairTokens(prompt_ids=[3] * 9, chosen_ids=[4] * 7, rejected_ids=[5] * 4),
    PairTokens(prompt_ids=[3] * 3, chosen_ids=[4] * 2, rejected_ids=[5] * 6),
    PairTokens(prompt_ids=[3] * 2, chosen_ids=[4] * 3, rejected_ids=[5] * 2),
]
LENGTHS = np.array([[9, 7, 4], [3, 2, 6], [2, 3, 2]])


def build(model_type, attention="sdpa"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    disable_dropout(model)  # as training does
    enable_pair_scoring(model, model_type, "torch")
    return model.train()


def bmm_flops(a_shape, b_shape, *args, **kwargs):
    """No sum, no product of matrices: transformers 5.17 multiplies positions by rotary frequencies this way."""
    (batch, rows, inner), columns = a_shape, b_shape[2]
    return 0 if inner == 1 else 2 * batch * rows * inner * columns


def counted(function):
    """FLOPs of a call; sdpa as its plain products, which is what the counter knows on a CPU."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: bmm_flops})
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        *((name, kind) for name in FAMILIES for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")),
        *((name, SPAN_ATTENTION) for name in FAMILIES if name not in ("gemma2", "gpt2")),
    ],
)
def test_equal_to_torchs_counter(model_type, attention):
    model = build(model_type, "sdpa" if attention == SPAN_ATTENTION else attention)
    end_to_end = attention == SPAN_ATTENTION and choose_end_to_end(model, torch.device("cpu"))
    assert model.config._attn_implementation == attention
    costs = unit_costs(model)
    batch = collate_pairs(PAIRS, shared_prompt=model_type != "gpt2", end_to_end=end_to_end)
    work = work_of_batch(batch)
    loss = None

    def forward():
        nonlocal loss
        loss = score_pairs(model, batch).sum()

    assert counted(forward) == forward_flops(costs, work).total
    expected = training_flops(costs, work, gradient_checkpointing=False, gradients_in_forward=False)
    backward = expected.backward + expected.head - forward_flops(costs, work).head
    assert counted(lambda: loss.backward()) == backward
    # The counter saw sdpa's plain products, which keep the scores; a fused kernel computes them again.
    assert expected.recompute == (0 if attention == "eager" else forward_flops(costs, work).attention // 2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_checkpointing_runs_the_layers_once_more(model_type):
    model = build(model_type, "eager")
    checkpoint_activations(model)
    batch = collate_pairs(PAIRS, shared_prompt=model_type != "gpt2")

    def step():
        score_pairs(model, batch).sum().backward()

    expected = training_flops(
        unit_costs(model), work_of_batch(batch), gradient_checkpointing=True, gradients_in_forward=False
    )
    assert counted(step) == expected.total


@pytest.mark.parametrize("early", [True, False])
def test_frozen_weights_get_no_gradient(early):
    """As beside an adapter; here the first norm trains, so that a gradient goes through every layer."""
    model = build("llama", "eager")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    batch = collate_pairs(PAIRS, shared_prompt=True)

    def step():
        if early:
            scored, _ = preference_step(model, batch, lambda logps_P2, pairs: logps_P2.sum(-1))
            scored.loss.backward()
        else:
            score_pairs(model, batch).sum().backward()

    options = {"gradient_checkpointing": False, "gradients_in_forward": early, "frozen": True}
    assert counted(step) == training_flops(unit_costs(model), work_of_batch(batch), **options).total


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixture_costs_what_its_tokens_are_sent_to(checkpointing):
    """Two of four experts; the routers' own products, which are thousandths, are not counted."""
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    enable_pair_scoring(model, "mixtral", "torch")
    model.train()
    if checkpointing:
        checkpoint_activations(model)
    batch = collate_pairs(PAIRS, shared_prompt=False)
    expected = training_flops(
        unit_costs(model), work_of_batch(batch), gradient_checkpointing=checkpointing, gradients_in_forward=False
    )
    again = 0 if checkpointing else expected.recompute  # of fused attention, which the counter sees as plain products
    got = counted(lambda: score_pairs(model, batch).sum().backward())
    assert got == pytest.approx(expected.total - again, rel=0.03)
    layers = 3 * 4 * 32 * 48 * model.config.num_hidden_layers
    everything = sum(p.numel() for p in model.parameters())
    assert active_parameters(model) == everything - layers // 2


def test_sizes_are_read_where_weights_are_not():
    """Under ZeRO-3 a weight is empty, on the meta device it has no memory: the costs are the same."""
    model = build("llama")
    costs = unit_costs(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert unit_costs(model) == costs


@pytest.mark.parametrize("attention", ["sdpa", SPAN_ATTENTION, "varlen_spans"])
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_work_from_lengths_is_that_of_the_batch(shared_prompt, attention):
    layout = {"shared_prompt": shared_prompt, "end_to_end": attention != "sdpa"}
    assert work_of_lengths(LENGTHS, **layout, attn_implementation=attention) == work_of_batch(
        collate_pairs(PAIRS, **layout), attention
    )


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_one_call_per_layer_computes_what_is_seen(shared_prompt):
    """(query, key) pairs counted in the mask that sdpa would have taken; keys: those that the call is handed."""
    batch = collate_pairs(PAIRS, shared_prompt=shared_prompt, end_to_end=True)
    layout = varlen_layout(batch.spans.lengths, batch.varlen_index)
    work = work_of_batch(batch, "varlen_spans")
    assert (work.positions, work.keys) == (int(layout.cu_q[-1]), int(layout.cu_k[-1]))
    assert (work.scores, work.masked) == (int(_visible(batch).sum()), 0)


@pytest.mark.parametrize(
    ("lengths", "positions", "separate", "scores"),
    [((300, 250, 250), 800, 1100, 257_900), ((1000, 300, 300), 1600, 2600, 1_190_800)],
)
def test_a_shared_prompt_spares_positions(lengths, positions, separate, scores):
    """The two shapes of docs/performance.md: 0.73 and 0.62 of the positions; a mask computes every pair of positions."""
    layout = {"end_to_end": True, "attn_implementation": "varlen_spans"}
    shared, apart = (work_of_lengths(np.array([lengths]), shared_prompt=x, **layout) for x in (True, False))
    masked = work_of_lengths(np.array([lengths]), shared_prompt=True)
    assert (shared.positions, apart.positions, shared.scores) == (positions, separate, scores)
    assert shared.keys == apart.keys == separate and shared.scores < apart.scores < masked.scores
    print(
        f"{lengths}: positions {positions}/{separate} = {positions / separate:.2f}, scores {shared.scores / apart.scores:.2f} of "
        f"two sequences', {shared.scores / masked.scores:.2f} of a mask's"
    )


def test_work_by_hand():
    """Shared: segments of 20, 11 and 7 in rows of 20, so the last two share one. Spans: no padding, a call for each response.
    Flash: six sequences, causal halves only."""
    assert work_of_lengths(LENGTHS, shared_prompt=True) == Work(40, 40, 800, 800, 24)
    spans = work_of_lengths(LENGTHS, shared_prompt=True, end_to_end=True, attn_implementation=SPAN_ATTENTION)
    assert spans == Work(38, 52, 16**2 + 4 * 13 + 5**2 + 6 * 9 + 5**2 + 2 * 4, 4 * 13 + 6 * 9 + 2 * 4, 24)
    flash = work_of_lengths(LENGTHS, shared_prompt=False, attn_implementation="flash_attention_2")
    assert flash == Work(6 * 16, 6 * 16, sum(n * (n + 1) // 2 for n in (16, 13, 5, 9, 5, 4)), 0, 24)
    assert total_work([flash, flash]).scores == 2 * flash.scores and total_work([]) == NO_WORK
    assert work_of_lengths(LENGTHS[:0], shared_prompt=True) == NO_WORK


def test_the_head_costs_6tdv_or_8tdv():
    costs = UnitCosts(per_position=10, per_score=2, per_response_token=100, recomputed_per_position=8)
    work = Work(positions=8, keys=8, scores=32, masked=32, response_tokens=5)
    heads = [
        training_flops(costs, work, gradient_checkpointing=False, gradients_in_forward=early).head
        for early in (True, False)
    ]
    assert heads == [3 * 500, 4 * 500]
    checkpointed = training_flops(costs, work, gradient_checkpointing=True, gradients_in_forward=True)
    assert checkpointed.recompute == 64 + 64 + 32, "the layers once more, and half of the attention for the kernel"
    assert checkpointed.useful == 3 * (80 + 64 + 500)


def test_a_config_without_attention_names_the_field():
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="num_attention_heads"):
        unit_costs(model)
