"""Pairs in one variable-length call per layer: log-probs and gradients of plain forwards, whichever kernel computes it."""

import inspect
import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface
from transformers.integrations import flex_attention as theirs

from mrpo_scale.logps import attention_ways
from mrpo_scale.logps.attention_choice import TRIAL, choose_end_to_end, trial_flex_spans
from mrpo_scale.logps.attention_ways import FLEX, REFERENCE, WAYS, FlexSpans, attention_function
from mrpo_scale.logps.masked_attention import masked_attention, varlen_reference
from mrpo_scale.logps.pair_batch import _in_window, _visible, collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.logps.varlen_layout import varlen_index, varlen_layout
from tests.logps.test_shared_prompt import FAMILIES, PAIRS, WINDOW, plain_logps, tiny_model
from tests.tiny import checkpoint_activations

CPU = torch.device("cpu")
WEIGHTS = torch.linspace(-1, 2, len(PAIRS) * 2).view(-1, 2)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def plain_gradients(model):
    for pair, weights in zip(PAIRS, WEIGHTS, strict=True):
        for response, weight in zip((pair.chosen_ids, pair.rejected_ids), weights, strict=True):
            logps = model(input_ids=torch.tensor([pair.prompt_ids + response])).logits[0].log_softmax(-1)
            rows = torch.arange(len(response)) + len(pair.prompt_ids) - 1
            (weight * logps[rows, torch.tensor(response)].sum()).backward()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("shared_prompt", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_plain_forwards_and_backwards(model_type, shared_prompt, checkpointing):
    """Texts longer than windows, prompts longer and shorter than them, responses and prompts of one token, five pairs in a call."""
    model = tiny_model(model_type, "eager" if model_type == "gemma2" else "sdpa")
    expected_P2, expected = plain_logps(model, PAIRS), plain_gradients(model)
    enable_pair_scoring(model, model_type)
    assert choose_end_to_end(model, CPU, asked=REFERENCE) and model.config._attn_implementation == REFERENCE
    if checkpointing:
        checkpoint_activations(model)
        model.train()
    got_P2 = score_pairs(model, collate_pairs(PAIRS, shared_prompt=shared_prompt, end_to_end=True))
    assert ((got_P2 - expected_P2) / expected_P2).abs().max() < 1e-5
    (got_P2 * WEIGHTS).sum().backward()
    for name, got in gradients(model).items():
        assert (got - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    # Without pairs the model is what it was, soft-capped scores included.
    torch.testing.assert_close(plain_logps(model.eval(), PAIRS), expected_P2)


def test_a_prompt_is_read_once_in_every_layer():
    """Queries of a layer: the tokens of the row; keys: each prompt twice."""
    seen = []

    def kernel(query, key, value, layout, *, scale, window, **_):
        seen.append((len(query), len(key), len(layout.cu_q) - 1))
        places = (layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)
        return varlen_reference(query, key, value, *places, scale=scale, window_size=(-1, 0), enable_gqa=True)

    model = tiny_model("llama", "sdpa")
    enable_pair_scoring(model, "llama")
    model.set_attn_implementation(REFERENCE)
    function = attention_function(attention_ways.Way(REFERENCE, "counted", kernel))
    known = AttentionInterface._global_mapping[REFERENCE]
    AttentionInterface.register(REFERENCE, function)
    try:
        with torch.no_grad():
            score_pairs(model, collate_pairs(PAIRS, shared_prompt=True, end_to_end=True))
    finally:
        AttentionInterface.register(REFERENCE, known)
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in PAIRS)
    prompts = sum(len(p.prompt_ids) for p in PAIRS)
    assert seen == [(tokens, tokens + prompts, 2 * len(PAIRS))] * 4


# ---- kernels that need a GPU: what they are told ---------------------------------------------------------------------


def layer(dtype=torch.float32, device="cpu", heads=4, key_heads=2):
    """(query, key, value, layout) of the trial's pairs."""
    torch.manual_seed(0)
    length = sum(trunk + sum(branches) for trunk, branches in TRIAL)
    tensors = [torch.randn(1, n, length, 8, dtype=dtype, device=device) for n in (heads, key_heads, key_heads)]
    return *(x.requires_grad_() for x in tensors), varlen_layout(TRIAL, varlen_index(TRIAL).to(device))


def through(way, query, key, value, spans, **options):
    module = torch.nn.Module()
    module.is_causal = True
    return attention_function(way)(module, query, key, value, None, spans=spans, **options)[0]


@pytest.mark.parametrize("window", [None, 37])
def test_torchs_varlen_attn_takes_what_it_is_given(window):
    """On meta, where its own shape functions run: arguments, a gradient for each input, grouped heads, no read of the device."""
    *inputs, layout = layer(torch.bfloat16, "meta")
    query, key, value = (x[0].transpose(0, 1) for x in inputs)
    options = {"scale": 0.3, "window": window, "softcap": None, "sinks": None, "dropout": 0.0}
    output = WAYS["varlen_spans"].kernel(query, layout.keys_of(key), layout.keys_of(value), layout, **options)
    assert output.shape == query.shape
    output.sum().backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


def test_torch_2_11_has_keys_repeated_for_grouped_heads(monkeypatch):
    """Its varlen_attn has no `enable_gqa`."""

    def of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return varlen_reference(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
        )

    inputs = layer()
    expected = through(WAYS[REFERENCE], *inputs, sliding_window=9)
    monkeypatch.setattr(attention_ways, "varlen_attn", of_2_11)
    torch.testing.assert_close(through(WAYS["varlen_spans"], *inputs, sliding_window=9), expected)


# fmt: off
# The signatures of flash-attn 2.8 and of flash-attn 3.
def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
            block_table=None):
    assert causal and q.dtype == k.dtype == v.dtype and dropout_p == 0.0
    return varlen_reference(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        scale=softmax_scale, window_size=(window_size[0], 0), enable_gqa=True, softcap=softcap or None)


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
            attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0):
    output = flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale,
                     causal=causal, window_size=window_size, softcap=softcap)
    return output, None  # and the log of the scores' sum, in some versions
# fmt: on


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"softcap": 3.0, "scaling": 0.2}], ids=str)
@pytest.mark.parametrize(("name", "function"), [("fa2_spans", flash_2), ("fa3_spans", flash_3)])
def test_flash_attention_is_told_the_same(monkeypatch, name, function, options):
    module = types.ModuleType(WAYS[name].package)
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    query, key, value, layout = layer()
    expected = through(WAYS[REFERENCE], query, key, value, layout, **options)
    torch.testing.assert_close(through(WAYS[name], query, key, value, layout, **options), expected)


def test_autocast_leaves_one_dtype():
    """Rotations under autocast leave queries and keys in float32 beside values in bfloat16, which no kernel takes."""
    query, key, value, layout = layer()
    with torch.autocast("cpu", torch.bfloat16):
        output = through(WAYS[REFERENCE], query, key, value.bfloat16(), layout)
    assert output.dtype == torch.bfloat16


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("shared_prompt", [True, False], ids=["shared", "separate"])
def test_flex_sees_what_a_mask_shows(shared_prompt, window):
    batch = collate_pairs(PAIRS, shared_prompt=shared_prompt, end_to_end=True)
    spans = FlexSpans(batch.segment_BL[0], batch.part_BL[0], batch.position_ids_BL[0])
    at = torch.arange(batch.input_ids_BL.shape[1])
    seen_LL = spans.seen(window)(0, 0, at[:, None], at[None])
    expected_BLL = _visible(batch)
    assert torch.equal(seen_LL, (expected_BLL if window is None else _in_window(batch, expected_BLL, window))[0])


@torch.no_grad()
@pytest.mark.parametrize("options", [{"sliding_window": 9}, {"softcap": 3.0}], ids=str)
def test_flex_computes_the_same(options, monkeypatch):
    """Its forward, without the compiler; on a CPU it has no backward."""
    monkeypatch.setattr(
        theirs,
        "compile_friendly_flex_attention",
        lambda *inputs, training, **kwargs: flex_attention(*inputs, **kwargs),
    )
    *inputs, layout = layer()
    inputs = [x.detach() for x in inputs]
    expected = through(WAYS[REFERENCE], *inputs, layout, **options)
    got = through(WAYS[FLEX], *inputs, trial_flex_spans(CPU), **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- plain products --------------------------------------------------------------------------------------------------


def test_sinks_take_their_share():
    """gpt-oss: softmax over the scores and one more, which has no value."""
    query, key, value = (torch.randn(2, 4, 5, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp().view(-1, 1, 1))
    torch.testing.assert_close(masked_attention(query, key, value, None, sinks=sinks), weights @ value)


def test_the_reference_has_the_signature_of_torch():
    ours, torchs = (inspect.signature(f).parameters for f in (varlen_reference, attention_ways.varlen_attn))
    positional = [name for name, p in torchs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[:7] == positional[:7]
    assert all(torchs[name].default == ours[name].default for name in ("scale", "window_size"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_k": 3}, "the longest"),
        ({"window_size": (4, 4)}, "not causal"),
        ({"enable_gqa": False}, "heads differ"),
    ],
)
def test_the_reference_refuses_what_would_be_wrong_on_a_gpu(change, said):
    query, key, value, layout = layer()
    options = {"window_size": (-1, 0), "enable_gqa": True, "max_q": layout.max_q, "max_k": layout.max_k, **change}
    tensors = [x[0].transpose(0, 1) for x in (query, key, value)]
    tensors = [tensors[0], *(layout.keys_of(x) for x in tensors[1:])]
    with pytest.raises(ValueError, match=said):
        varlen_reference(*tensors, cu_seq_q=layout.cu_q, cu_seq_k=layout.cu_k, **options)
