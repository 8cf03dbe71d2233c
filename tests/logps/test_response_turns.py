"""Log-probs of responses of several turns: only what the assistant writes is summed, whatever the layout of the batch."""

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale.data import find_layout
from mrpo_scale.data.pair_dataset import prepare_pairs
from mrpo_scale.data.pairs import PairTokens
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.logps.flops import work_of_batch, work_of_lengths
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import choose_end_to_end, enable_pair_scoring, score_pairs
from mrpo_scale.logps.span_attention import SPAN_ATTENTION
from tests.tool_templates import logps_by_hand, rows, write_tool_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_tool_models(tmp_path_factory.mktemp("models"))


def pairs_of(folder, examples):
    text = ModelText(AutoTokenizer.from_pretrained(folder), name="policy", max_context=None)
    found = datasets.Dataset.from_list(examples)
    return prepare_pairs(found, find_layout(found), [text], max_length=None)


@pytest.mark.parametrize("template", ["qwen", "llama", "mistral"])
def test_log_probs_equal_plain_transformers_in_every_layout(folders, template):
    """Three turns with two tool calls, turns of users between, one call alone; shared prompt, separate, end to end."""
    examples = rows(6)
    pairs = pairs_of(folders[template], examples)
    assert len(pairs) == len(examples)
    tokens = [pairs.tokens(i)[0] for i in range(len(pairs))]
    expected = torch.tensor([logps_by_hand(folders[template], row) for row in examples], dtype=torch.float64)
    assert pairs.scored[:, 0].tolist() == expected[..., 1].tolist()
    model = AutoModelForCausalLM.from_pretrained(folders[template]).eval()
    enable_pair_scoring(model, template, "torch")
    layouts = [(True, False), (False, False)]
    end_to_end = choose_end_to_end(model, torch.device("cpu"))
    layouts += [(True, True), (False, True)] if end_to_end else []
    for shared_prompt, end_to_end in layouts:
        batch = collate_pairs(tokens, shared_prompt=shared_prompt, end_to_end=end_to_end)
        assert batch.response_lengths.tolist() == pairs.scored[:, 0].tolist()
        assert len(batch.labels_T) == pairs.scored.sum(), "only what is scored reaches the head"
        with torch.no_grad():
            torch.testing.assert_close(score_pairs(model, batch).double(), expected[..., 0], rtol=1e-5, atol=1e-5)
    assert len(layouts) == 4


def test_gradients_are_those_of_the_scored_tokens_alone(folders):
    """Of shared and separate rows, against a plain forward of each response."""
    tokens = [PairTokens([3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [2, 4], [0, 1, 3, 4])]
    model = AutoModelForCausalLM.from_pretrained(folders["qwen"]).double()
    total = 0.0
    for ids, kept in ((tokens[0].chosen_ids, [0, 1, 4, 5]), (tokens[0].rejected_ids, [1, 2])):
        logps = model(torch.tensor([[3, 4, 5, *ids]])).logits[0].log_softmax(-1)
        total = total + sum(logps[2 + i, ids[i]] for i in kept) * len(kept)
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    enable_pair_scoring(model, "qwen", "torch")
    for shared_prompt in (True, False):
        model.zero_grad()
        batch = collate_pairs(tokens, shared_prompt=shared_prompt)
        assert batch.response_lengths.tolist() == [[4, 2]]
        (score_pairs(model, batch) * batch.response_lengths).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", SPAN_ATTENTION])
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_the_heads_work_is_that_of_the_scored_tokens(shared_prompt, attention):
    pairs = [PairTokens([1] * 4, [2] * 9, [3] * 5, [2, 5], [1, 2]), PairTokens([1] * 3, [2] * 4, [3] * 6)]
    lengths = np.array([[4, 9, 5], [3, 4, 6]])
    layout = {"shared_prompt": shared_prompt, "end_to_end": attention == SPAN_ATTENTION}
    work = work_of_lengths(lengths, scored=6 + 4 + 10, **layout, attn_implementation=attention)
    assert work == work_of_batch(collate_pairs(pairs, **layout))
    everything = work_of_lengths(lengths, **layout, attn_implementation=attention)
    assert work._replace(response_tokens=24) == everything
