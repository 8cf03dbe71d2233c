"""The pair forward of models whose classes are unlike the others: the same log-probs and gradients as their own logits give."""

import pytest
import torch
from mrpo_kernels import cpu_linear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.layer_masks import body_of
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.logps.self_check import check_pair_scoring

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODELS = {
    # `base_model` of its class is the model itself; its attention changes what linear layers return in place.
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "attention_chunk_size": 64,
    },
    # Adds to what a linear layer returns, in place.
    "gemma3n_text": {
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}
PAIR = PairTokens([5, 6, 7, 8], [9, 10, 11], [12, 13])


@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_and_gradients_are_those_of_its_own_logits(kind, monkeypatch):
    monkeypatch.setattr(cpu_linear, "SMALLEST", 0)  # every layer takes the fast products where there are any
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    expected = []
    for response in (PAIR.chosen_ids, PAIR.rejected_ids):
        logits = model(input_ids=torch.tensor([PAIR.prompt_ids + response]), use_cache=False).logits[0]
        logps = logits[len(PAIR.prompt_ids) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        expected.append(logps.sum())
    weights = [p for p in model.parameters() if p.requires_grad]
    of_plain = torch.autograd.grad(expected[0] - 2 * expected[1], weights, allow_unused=True)

    enable_pair_scoring(model, "policy")
    check_pair_scoring(model, "policy", shared_prompt=False, device=CPU)
    got_P2 = score_pairs(model, collate_pairs([PAIR], shared_prompt=False))
    torch.testing.assert_close(got_P2[0], torch.stack(expected), rtol=1e-5, atol=0)
    of_pairs = torch.autograd.grad(got_P2[0, 0] - 2 * got_P2[0, 1], weights, allow_unused=True)
    for one, other in zip(of_pairs, of_plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_a_model_without_a_body_of_its_own_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    assert body_of(model) is model.model
    model.base_model_prefix = "nothing"
    assert body_of(model) is model.model
    model.model = nn.Identity()
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 0 parts that could be its body"):
        body_of(model)
