"""Pair batches: log-probs of shared-prompt and separate rows equal plain forwards, also for texts longer than the window."""

import logging

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps import attention_choice, pair_batch
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.layer_masks import supports_shared_prompt
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import (
    choose_shared_prompt,
    enable_pair_scoring,
    score_pairs,
)

VOCABULARY, WINDOW = 97, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
#: Families with windows by layer, windows everywhere and none, caps and scales. Every other type: test_causal_types.py.
FAMILIES = [
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "qwen2",
    "qwen3",
]
OWN = {
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"sliding_window": WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gpt_neox": {"num_key_value_heads": 4},
    "granite": {"logits_scaling": 4.0},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
}
CASES = [(kind, impl) for kind in FAMILIES for impl in ("sdpa", "eager") if (kind, impl) != ("gemma2", "sdpa")]


def tiny_model(model_type, attention, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SIZES, **OWN.get(model_type, {})})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # far from the near-zero initialisation, so that attention is not uniform
                parameter.normal_(0, 0.15)
    return model


def random_pairs(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, VOCABULARY, (n,), generator=g).tolist()

    return [PairTokens(ids(a), ids(b), ids(c)) for a, b, c in lengths]


# Prompts and responses longer and shorter than the window, a prompt of one token, several pairs packed into a row.
PAIRS = random_pairs([(20, 17, 25), (3, 5, 2), (9, 30, 1), (1, 4, 4), (12, 12, 13)])


@torch.no_grad()
def plain_logps(model, pairs):
    """Two ordinary forwards per pair, without padding, in the model's own attention."""
    values = []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            logps_LV = model(input_ids=torch.tensor([pair.prompt_ids + response])).logits[0].double().log_softmax(-1)
            start = len(pair.prompt_ids) - 1
            rows = torch.arange(start, start + len(response))
            values.append(logps_LV[rows, torch.tensor(response)].sum())
    return torch.stack(values).view(-1, 2)


# Eager attention takes a mask over padded rows, nothing else.
LAYOUTS = [(*case, end_to_end) for case in CASES for end_to_end in ([False, True] if case[1] == "sdpa" else [False])]


@pytest.mark.parametrize(("model_type", "attention", "end_to_end"), LAYOUTS)
@pytest.mark.parametrize("shared_prompt", [True, False], ids=["shared", "separate"])
def test_equals_two_plain_forwards(model_type, attention, end_to_end, shared_prompt):
    model = tiny_model(model_type, attention)
    expected = plain_logps(model, PAIRS)
    enable_pair_scoring(model, model_type)
    if end_to_end:
        assert choose_end_to_end(model, torch.device("cpu"))
    with torch.no_grad():
        got = score_pairs(model, collate_pairs(PAIRS, shared_prompt=shared_prompt, end_to_end=end_to_end))
    assert ((got - expected) / expected).abs().max() < 1e-5
    # The model's own logits are what they were.
    torch.testing.assert_close(plain_logps(model, PAIRS), expected)


def test_the_window_matters_for_these_texts():
    """The comparison above would not notice a lost window if the texts were too short: widening it must change the scores."""
    model = tiny_model("mistral", "sdpa")
    expected = plain_logps(model, PAIRS)
    model.config.sliding_window = None
    assert ((plain_logps(model, PAIRS) - expected) / expected).abs().max() > 1e-3


def test_gradients_equal_two_plain_forwards():
    model = tiny_model("llama", "sdpa")
    weights = torch.linspace(-1, 2, len(PAIRS) * 2).view(-1, 2)

    def body_gradient():
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        head = model.lm_head.weight.grad.clone()
        model.zero_grad()
        return gradient, head

    total = torch.zeros(())
    for (c, r), pair in zip(weights, PAIRS, strict=True):
        for weight, response in ((c, pair.chosen_ids), (r, pair.rejected_ids)):
            logps = model(input_ids=torch.tensor([pair.prompt_ids + response])).logits[0].log_softmax(-1)
            rows = torch.arange(len(response)) + len(pair.prompt_ids) - 1
            total = total + weight * logps[rows, torch.tensor(response)].sum()
    total.backward()
    expected = body_gradient()
    enable_pair_scoring(model, "llama")
    (score_pairs(model, collate_pairs(PAIRS, shared_prompt=True)) * weights).sum().backward()
    for got, want in zip(body_gradient(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_are_packed_and_order_is_kept():
    batch = collate_pairs(PAIRS, shared_prompt=True)
    assert batch.input_ids_BL.shape == (3, 62)  # 62 tokens in the longest pair; the short ones share a row
    assert batch.cu_seqlens.diff().tolist() == [17, 25, 5, 2, 30, 1, 4, 4, 12, 13]
    assert batch.labels_T.tolist() == [i for p in PAIRS for ids in (p.chosen_ids, p.rejected_ids) for i in ids]
    assert batch.num_tokens == sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in PAIRS)
    assert batch.num_pairs == len(PAIRS)


def test_end_to_end_is_one_row_without_padding():
    shared = collate_pairs(PAIRS, shared_prompt=True, end_to_end=True)
    padded = collate_pairs(PAIRS, shared_prompt=True)
    assert shared.input_ids_BL.shape == (1, padded.num_tokens)
    assert shared.spans.lengths == ((20, (17, 25)), (3, (5, 2)), (9, (30, 1)), (1, (4, 4)), (12, (12, 13)))
    assert torch.equal(shared.labels_T, padded.labels_T) and torch.equal(shared.cu_seqlens, padded.cu_seqlens)


def test_gradients_end_to_end_equal_those_of_padded_rows():
    gradients = []
    for end_to_end in (False, True):
        model = tiny_model("llama", "sdpa")
        enable_pair_scoring(model, "llama")
        assert not end_to_end or choose_end_to_end(model, torch.device("cpu"))
        weights = torch.linspace(-1, 2, len(PAIRS) * 2).view(-1, 2)
        logps_P2 = score_pairs(model, collate_pairs(PAIRS, shared_prompt=True, end_to_end=end_to_end))
        (logps_P2 * weights).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_flash_attention_gets_separate_responses_end_to_end(monkeypatch):
    """What a varlen attention is told, read by one that computes with it; flash-attn itself needs a GPU."""

    def varlen(module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **kwargs):
        assert attention_mask is None and query.shape[0] == 1 and cu_seq_lens_q.dtype == torch.int32
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k) and cu_seq_lens_q[-1] == query.shape[2]
        lengths = cu_seq_lens_q.diff().tolist()
        assert max(lengths) == max_length_q
        rows = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], 1), None

    # transformers looks whatever is called flash up on the hub.
    for module in (pair_batch, attention_choice):
        monkeypatch.setattr(module, "is_flash", lambda config: config._attn_implementation == "varlen_in_torch")
    AttentionInterface.register("varlen_in_torch", varlen)
    model = tiny_model("llama", "sdpa")
    expected = plain_logps(model, PAIRS)
    enable_pair_scoring(model, "llama")
    model.set_attn_implementation("varlen_in_torch")
    assert choose_end_to_end(model, torch.device("cpu"))
    assert choose_shared_prompt("auto", model, "llama") is False
    batch = collate_pairs(PAIRS, shared_prompt=False, end_to_end=True)
    assert batch.input_ids_BL.shape == (1, batch.num_tokens)  # no padding
    with torch.no_grad():
        got = score_pairs(model, batch)
    assert ((got - expected) / expected).abs().max() < 1e-5


def test_what_is_compiled_keeps_its_mask():
    """Lengths of spans are constants to a compiler, which would start again with every batch."""
    model = tiny_model("llama", "sdpa")
    assert not choose_end_to_end(model, torch.device("cpu"), compiled=True)
    assert model.config._attn_implementation == "sdpa"


def test_models_that_cannot_share_run_two_sequences_or_are_refused(caplog):
    """Bloom's attention is its own, with a slope by distance in the row in place of positions."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = BloomForCausalLM(config).eval()
    assert not supports_shared_prompt(model)
    with caplog.at_level(logging.INFO):
        assert choose_shared_prompt("auto", model, "bloom") is False
    assert "two sequences per pair, since its attention is its own" in caplog.text
    with pytest.raises(ConfigError, match=r"shared_prompt: true.*bloom.*its attention is its own"):
        choose_shared_prompt("true", model, "bloom")
    enable_pair_scoring(model, "bloom")
    short = random_pairs([(4, 6, 3), (2, 5, 9)])
    with torch.no_grad():
        got = score_pairs(model, collate_pairs(short, shared_prompt=False))
    torch.testing.assert_close(got.double(), plain_logps(model, short), rtol=1e-5, atol=1e-5)
