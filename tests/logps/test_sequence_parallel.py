"""Who holds which tokens and heads, without processes: what the ranks of a group send is put where a collective would put it."""

import dataclasses
import itertools
import math

import pytest
import torch

from mrpo_scale.logps.pair_batch import collate_pairs, over_group
from mrpo_scale.logps.sequence_parallel import (
    SequenceGroup,
    group_ranks,
    heads_by_rank,
    heads_of_rank,
    tokens_of_rank,
)
from tests.logps.test_shared_prompt import random_pairs

PAIRS = random_pairs([(20, 17, 25), (3, 5, 2), (9, 30, 1), (1, 4, 4)])


def members(size):
    return [SequenceGroup(None, rank, size) for rank in range(size)]


def test_groups_are_neighbours_and_cover_the_world():
    assert [list(ranks) for ranks in group_ranks(8, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(ranks) for ranks in group_ranks(2, 1)] == [[0], [1]]


# Heads of keys: as many as of queries, a multiple of the group, divisors of it, one, and neither (6 of 12 over 4).
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 8, 4), (8, 4, 2), (8, 2, 4), (4, 1, 4), (12, 6, 4)])
def test_every_head_meets_its_keys_and_comes_home(heads, key_heads, size):
    """Queries say (head, token), keys the head that they are: after the exchange each query's head finds its own key's head at its
    place, over all tokens in order; and the way back restores the queries."""
    tokens, width = 3, 5
    head, token = torch.arange(heads), torch.arange(size * tokens)
    query = (100 * head[:, None] + token)[None, :, :, None].expand(-1, -1, -1, width)
    key = torch.arange(key_heads)[None, :, None, None].expand(1, key_heads, size * tokens, 2)

    def trade(given):  # [from, to, ...] -> what each rank gets
        return list(torch.stack(given).transpose(0, 1))

    def pieces(state):
        return [heads_by_rank(part, size) for part in state.split(tokens, 2)]

    queries = [heads_of_rank(got, width) for got in trade(pieces(query))]
    keys = [heads_of_rank(got, 2) for got in trade(pieces(key))]
    for rank, (q, k) in enumerate(zip(queries, keys, strict=True)):
        assert q.shape == (1, heads // size, size * tokens, width)
        assert q.shape[1] % k.shape[1] == 0 and k.shape[1] == math.lcm(key_heads, size) // size
        own = head[rank * heads // size : (rank + 1) * heads // size]
        assert torch.equal(q[0, :, :, 0], 100 * own[:, None] + token)
        expected = own // (heads // key_heads)
        assert torch.equal(k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)[:, 0, 0], expected)
    outputs = [q.transpose(1, 2) for q in queries]  # [1, L, heads of a rank, d], as attention returns them
    back = trade([o.reshape(size, tokens, -1) for o in outputs])
    for got, mine in zip(back, query.split(tokens, 2), strict=True):
        assert torch.equal(tokens_of_rank(got, width), mine.transpose(1, 2))


@pytest.mark.parametrize("shared_prompt", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("size", [2, 4, 7])
def test_every_scored_token_has_one_rank(shared_prompt, size):
    whole = collate_pairs(PAIRS, shared_prompt=shared_prompt, end_to_end=True)
    parts = [
        collate_pairs(PAIRS, shared_prompt=shared_prompt, end_to_end=True, group=member) for member in members(size)
    ]
    length = parts[0].input_ids_BL.shape[1]
    assert length % size == 0 and 0 <= length - whole.num_tokens < size
    # Padding at the end is a text of its own, which no token of a pair sees.
    assert parts[0].spans.lengths[: len(whole.spans.lengths)] == whole.spans.lengths
    assert sum(sum(n) + trunk for trunk, n in parts[0].spans.lengths) == length
    labels, predicted = [[] for _ in range(2 * len(PAIRS))], [[] for _ in range(2 * len(PAIRS))]
    for part in parts:
        mine = part.own_tokens
        at_T = part.logit_index_T + mine.start
        assert ((at_T >= mine.start) & (at_T < mine.stop)).all() and len(part.labels_T) == part.cu_seqlens[-1]
        for s, (a, b) in enumerate(itertools.pairwise(part.cu_seqlens.tolist())):
            labels[s] += part.labels_T[a:b].tolist()
            predicted[s] += at_T[a:b].tolist()
        assert torch.equal(part.response_lengths, whole.response_lengths) and part.num_pairs == len(PAIRS)
        assert part.num_positions == length // size
    bounds = whole.cu_seqlens.tolist()
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        assert labels[s] == whole.labels_T[a:b].tolist() and predicted[s] == whole.logit_index_T[a:b].tolist()
    assert sum(part.num_tokens for part in parts) == whole.num_tokens


def test_a_batch_moves_with_its_group():
    (first, _) = members(2)
    batch = collate_pairs(PAIRS, shared_prompt=True, end_to_end=True, group=first)
    moved = batch.to("cpu")
    for field in dataclasses.fields(batch):
        left, right = getattr(batch, field.name), getattr(moved, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_a_row_that_the_group_does_not_divide_is_a_mistake():
    whole = collate_pairs(random_pairs([(3, 2, 2)]), shared_prompt=True, end_to_end=True)
    with pytest.raises(AssertionError):
        over_group(whole, members(2)[0])
