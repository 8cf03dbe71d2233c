"""The index arithmetic of one variable-length call: whose keys lie where, and whose gradients come back to whom."""

import numpy as np
import pytest
import torch

from mrpo_scale.logps.varlen_layout import varlen_index, varlen_layout

# Trunks with two branches, none (separate responses), three; one token; an empty branch; a trunk of one.
LENGTHS = {
    "pairs": ((20, (17, 25)), (3, (5, 2)), (9, (30, 1)), (1, (4, 4))),
    "separate": ((37, ()), (45, ()), (1, ())),
    "mixed": ((4, (2, 3, 5)), (6, ()), (2, (1,)), (3, (0, 2))),
}


def texts(lengths):
    """[(queries, keys)] of every sequence, as token numbers, in the slowest way."""
    found, start = [], 0
    for trunk, branches in lengths:
        trunk_tokens = list(range(start, start + trunk))
        own = start + trunk
        for j, n in enumerate(branches or (0,)):
            branch = list(range(own, own + n))
            found.append(((trunk_tokens if j == 0 else []) + branch, trunk_tokens + branch))
            own += n
        start = own
    return found, start


@pytest.mark.parametrize("name", LENGTHS)
def test_sequences_have_their_own_text(name):
    lengths = LENGTHS[name]
    layout = varlen_layout(lengths, varlen_index(lengths))
    expected, num_tokens = texts(lengths)
    tokens = torch.arange(num_tokens)[:, None, None]
    keys = layout.keys_of(tokens).flatten().split(layout.cu_k.diff().tolist())
    queries = tokens.flatten().split(layout.cu_q.diff().tolist())
    assert [(q.tolist(), k.tolist()) for q, k in zip(queries, keys, strict=True)] == expected
    assert layout.max_q == max(len(q) for q, _ in expected) and layout.max_k == max(len(k) for _, k in expected)
    assert layout.cu_q.dtype == layout.cu_k.dtype == torch.int32


@pytest.mark.parametrize("name", LENGTHS)
def test_a_tokens_gradient_is_the_sum_of_its_keys(name):
    lengths = LENGTHS[name]
    layout = varlen_layout(lengths, varlen_index(lengths))
    expected, num_tokens = texts(lengths)
    x_T = torch.randn(num_tokens, 2, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(sum(len(keys) for _, keys in expected), 2, 3, dtype=torch.float64)
    (layout.keys_of(x_T) * upstream).sum().backward()
    slow = torch.zeros_like(x_T)
    for row, token in enumerate(token for _, keys in expected for token in keys):
        slow[token] += upstream[row]
    torch.testing.assert_close(x_T.grad, slow, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(layout.keys_of, x_T)


def test_separate_responses_are_not_gathered():
    layout = varlen_layout(LENGTHS["separate"], varlen_index(LENGTHS["separate"]))
    x = torch.randn(83, 2, 4)
    assert layout.keys_of(x) is x and layout.source_K is None


def test_any_lengths(lengths=None):
    """Random spans: every key is the token that it should be, every token is found again by its first key."""
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = [
            (int(random.integers(1, 9)), tuple(random.integers(0, 9, random.integers(0, 4)).tolist()))
            for _ in range(random.integers(1, 6))
        ]
        layout = varlen_layout(lengths, varlen_index(lengths))
        expected, num_tokens = texts(lengths)
        if layout.source_K is None:
            assert all(len(branches) <= 1 for _, branches in lengths)
            continue
        assert layout.source_K.tolist() == [token for _, keys in expected for token in keys]
        assert layout.source_K[layout.first_T].tolist() == list(range(num_tokens))
        again = [token for tokens, keys in layout.others for token in layout.source_K[keys].tolist()]
        assert again == [token for tokens, _ in layout.others for token in tokens.tolist()]
        assert num_tokens + len(again) == len(layout.source_K)


def test_one_tensor_moves_with_the_batch_and_is_cut_without_being_read():
    """Views of one tensor of integers: on a device that cannot be read (meta), too."""
    index = varlen_index(LENGTHS["pairs"])
    layout = varlen_layout(LENGTHS["pairs"], index.to("meta"))
    assert layout.cu_q.device.type == "meta" and layout.max_k == 45
    assert layout.keys_of(torch.empty(121, 2, 4, device="meta")).shape == (154, 2, 4)
    on_host = varlen_layout(LENGTHS["pairs"], index)
    assert all(
        part.untyped_storage().data_ptr() == index.untyped_storage().data_ptr()
        for part in (on_host.cu_k, on_host.first_T)
    )
