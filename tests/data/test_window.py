"""Windows: every row once, fillers of weight 0, the same pairs per step whatever the split, each pair in its micro-batch."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from mrpo_kernels import CombinedReferences
from torch.utils.data import BatchSampler

from mrpo_scale.data.dealing import WindowShape
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.data.window import Draw, PairExample, WeightedPairs, WindowSampler, held_out_sampler
from mrpo_scale.logps.micro_batches import policy_batches

LENGTHS_N = np.random.default_rng(0).lognormal(5, 0.6, 203).astype(np.int64)


class Rows:
    """Pairs whose prompt tells the row."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    @property
    def lengths(self):
        return np.array([[[row + 1, row % 3 + 1, 1]] for row in range(self.count)])

    def tokens(self, row):
        return (PairTokens([1] * (row + 1), [2] * (row % 3 + 1), [3]),)


def sampler_of(shape, lengths_N=LENGTHS_N, *, shuffle=True, seed=3, **options):
    return WindowSampler(lengths_N, shape, shuffle=shuffle, seed=seed, **options)


def of_ranks(sampler):
    """[ranks] the loader's batches, as accelerate deals them."""
    shape = sampler.shape
    batches = BatchSampler(sampler, shape.pairs, drop_last=False)
    return [list(BatchSamplerShard(batches, shape.ranks, rank)) for rank in range(shape.ranks)]


def windows_of_ranks(sampler):
    """[windows][ranks] draws."""
    steps = sampler.shape.accumulation
    ranks = of_ranks(sampler)
    return [
        [[draw for batch in batches[start : start + steps] for draw in batch] for batches in ranks]
        for start in range(0, len(ranks[0]), steps)
    ]


@pytest.mark.parametrize("max_tokens", [None, 400, 1000])
@pytest.mark.parametrize(("ranks", "pairs", "accumulation"), [(1, 4, 1), (4, 2, 3), (3, 1, 8)])
def test_every_row_once_and_fillers_to_whole_windows(ranks, pairs, accumulation, max_tokens):
    """As the loader hands them out, whatever a micro-batch is bounded by."""
    sampler = sampler_of(WindowShape(ranks, pairs, accumulation, max_tokens))
    draws = [draw for batches in of_ranks(sampler) for batch in batches for draw in batch]
    assert sorted(draw.row for draw in draws if not draw.filler) == list(range(203))
    size = ranks * pairs * accumulation
    assert len(draws) == len(sampler) == -(-203 // size) * size


def test_fillers_weigh_nothing_and_are_the_shortest_of_their_window():
    sampler = WindowSampler(Rows(19).lengths.sum((1, 2)), WindowShape(2, 2), shuffle=False, seed=3)
    examples = [WeightedPairs(Rows(19))[draw] for draw in sampler]
    assert sorted(e.row for e in examples if e.weight == 1) == list(range(19))
    assert [e.row for e in examples if e.weight == 0] == [16]


def test_drop_last_leaves_the_unfilled_window_out():
    sampler = sampler_of(WindowShape(2, 2), LENGTHS_N[:19], shuffle=False, drop_last=True)
    assert len(sampler) == 16 and sorted(sampler) == [Draw(row) for row in range(16)]


def test_epochs_differ_and_repeat():
    sampler = sampler_of(WindowShape(2, 2))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_window_is_the_same_pairs_whatever_the_split():
    """Windows of 8, whatever makes them; and those of the order in which chance draws rows, which does not see their lengths."""

    def rows(*shape, **options):
        windows = windows_of_ranks(sampler_of(WindowShape(*shape, **options)))
        return [sorted({(d.row, d.filler) for share in window for d in share}) for window in windows]

    splits = [rows(1, 8), rows(2, 2, 2), rows(4, 1, 2), rows(8, 1), rows(2, 4, max_tokens=300)]
    assert all(split == splits[0] for split in splits)
    order = torch.randperm(203, generator=torch.Generator().manual_seed(3)).tolist()
    assert [[row for row, filler in window if not filler] for window in splits[0]] == [
        sorted(order[start : start + 8]) for start in range(0, 203, 8)
    ]


@pytest.mark.parametrize("max_tokens", [None, 600])
def test_ranks_take_the_same_number_of_micro_batches_of_equally_many_pairs(max_tokens):
    for window in windows_of_ranks(sampler_of(WindowShape(4, 2, 4, max_tokens))):
        (order,) = {tuple(draw.micro_batch for draw in share) for share in window}
        assert list(order) == sorted(order) and set(order) == set(range(max(order) + 1))
        if max_tokens is None:
            assert order == (0, 0, 1, 1, 2, 2, 3, 3)


def test_held_out_rows_once_longest_first():
    rows = Rows(19)
    order = [draw.row for draw in held_out_sampler(rows, 2, 3)]
    assert len(order) == 24 and set(order) == set(range(19)) and order.count(0) == 6
    assert sorted(order[:6], reverse=True) == [18, 17, 16, 15, 14, 13]


def test_micro_batches_hold_their_pairs_with_their_own_scores():
    rows = [8, 9, 5, 4, 1, 0]
    examples = [PairExample(row, float(row != 9), Rows(10).tokens(row), i // 2) for i, row in enumerate(rows)]
    row_P = torch.tensor(rows, dtype=torch.float32)
    row_P2, row_KP, row_KP2 = row_P[:, None].expand(-1, 2), row_P.expand(3, -1), row_P[None, :, None].expand(3, -1, 2)
    references = CombinedReferences(row_KP2, row_P2, row_KP, row_P2, row_KP2)
    batches = policy_batches(examples, references, shared_prompt=True, pad_token_id=0)
    assert [batch.rows for batch in batches] == [(8, 9), (5, 4), (1, 0)]
    for batch in batches:
        for values in vars(batch.references).values():
            own_P2 = values.movedim(1, 0) if len(values) == 3 else values
            assert own_P2.flatten(1).tolist() == [[float(row)] * own_P2[0].numel() for row in batch.rows]
        assert batch.weight_P.tolist() == [float(row != 9) for row in batch.rows]
        assert batch.pairs.num_pairs == 2


@pytest.mark.parametrize(("ranks", "pairs", "accumulation"), [(1, 4, 1), (3, 2, 4)])
def test_windows_that_were_trained_are_not_made_again(ranks, pairs, accumulation):
    """Whoever resumes drops as many batches: what follows is the rest of the epoch, and of the skipped rows nothing can be read."""
    whole, resumed = (sampler_of(WindowShape(ranks, pairs, accumulation)) for _ in range(2))
    resumed.skipped = 3
    dealt = []
    resumed.deal = lambda window: (dealt.append(window), type(resumed).deal(resumed, window))[1]
    all_windows, rest = windows_of_ranks(whole), windows_of_ranks(resumed)
    assert rest[3:] == all_windows[3:] and len(rest) == len(all_windows) and len(dealt) == ranks * (len(rest) - 3)
    assert {draw.row for window in rest[:3] for draws in window for draw in draws} == {len(LENGTHS_N)}
