"""Dealing by length: nobody is left out, no rank waits long, budgets hold, and the draw of windows stays chance's."""

import numpy as np
import pytest
import torch

from benchmarks.dealing import as_drawn, log_normal, simulate
from mrpo_scale.data.dealing import WindowShape, cut_by_tokens, deal, deal_to_ranks, efficiency, pair_lengths
from mrpo_scale.data.window import WindowSampler

EIGHT, SIXTY_FOUR = WindowShape(8, 2, 4), WindowShape(64, 1, 8)


def lengths(seed, count):
    return log_normal(np.random.default_rng(seed), count)


@pytest.mark.parametrize("shape", [WindowShape(1, 4), EIGHT, SIXTY_FOUR, WindowShape(3, 5, 2, max_tokens=1500)])
def test_every_pair_goes_to_one_rank(shape):
    lengths_N = lengths(1, shape.size)
    dealt = deal(lengths_N, shape)
    assert sorted(dealt.pairs_RL.ravel()) == list(range(shape.size))
    assert dealt.pairs_RL.shape == (shape.ranks, shape.pairs * shape.accumulation)
    assert [i for part in dealt.micro_batches for i in range(part.start, part.stop)] == list(
        range(dealt.pairs_RL.shape[1])
    )
    if shape.max_tokens is None:
        assert {part.stop - part.start for part in dealt.micro_batches} == {shape.pairs}


def test_the_slowest_rank_of_a_micro_batch_is_hardly_slower_than_the_mean():
    """Log-normal lengths, sigma 0.6, at most 2.5 medians: the first column is how pairs were dealt until November 2026."""
    rng = np.random.default_rng(0)
    eight, many = (simulate(lambda n: log_normal(rng, n), shape) for shape in (EIGHT, SIXTY_FOUR))
    assert eight["drawn"] < 0.77 and many["drawn"] < 0.65
    assert eight["dealt"] > 0.95
    # One pair a rank and micro-batch: sorted runs are the best there is. With as many tokens as the longest pair has anyhow, ranks
    # take several short pairs at once, and wait less.
    assert 0.89 < many["dealt"] < 0.91 and many["budget"] > 0.92 and many["budget_micro_batches"] < 6
    assert eight["budget"] > 0.95


def test_one_pair_a_micro_batch_cannot_be_dealt_better():
    """Longest first in runs: the sum of the runs' longest is a sum that any other order exceeds or equals."""
    rng = np.random.default_rng(0)
    shape = WindowShape(3, 1, 4)
    for _ in range(20):
        lengths_N = rng.integers(1, 1000, 12)
        best = deal(lengths_N, shape).loads(lengths_N).max(0).sum()
        assert best == np.sort(lengths_N)[::-1][::3].sum()
        others = [rng.permutation(lengths_N).reshape(3, 4).max(0).sum() for _ in range(200)]
        assert min(others) >= best


def test_the_first_micro_batch_is_the_longest_and_shares_of_the_window_are_level():
    for seed in range(20):
        lengths_N = lengths(seed, EIGHT.size)
        old, new = (dealt(lengths_N, EIGHT).loads(lengths_N) for dealt in (as_drawn, deal))
        assert (np.diff(new.mean(0)) <= 0).all()
        assert new.max() <= old.max(), "what activations need room for does not grow"
        assert efficiency(new.sum(1, keepdims=True)) > 0.93


@pytest.mark.parametrize("padded", [False, True])
def test_a_token_budget_bounds_every_micro_batch(padded):
    """Where one pair alone is longer, it stands alone; and no two neighbours would have fitted together."""
    shape = WindowShape(4, 8, 2, max_tokens=2000, padded=padded)
    for seed in range(20):
        lengths_N = 3 * lengths(seed, shape.size)
        dealt = deal(lengths_N, shape)
        lengths_RL = lengths_N[dealt.pairs_RL]
        cost_RM = dealt.loads(lengths_N)
        counts = np.array([part.stop - part.start for part in dealt.micro_batches])
        if padded:
            cost_RM = np.stack([lengths_RL[:, part].max(1) for part in dealt.micro_batches], axis=1) * counts
        assert ((cost_RM <= 2000) | (counts == 1)).all() and (counts > 1).any()
        if not padded:
            assert (cost_RM[:, :-1] + cost_RM[:, 1:]).max(0).min() > 2000


@pytest.mark.parametrize(("count", "ranks"), [(0, 3), (2, 3), (3, 3), (103, 4), (64, 8)])
def test_any_number_of_rows_is_dealt_to_ranks(count, ranks):
    lengths_N = lengths(0, count)
    shares = deal_to_ranks(lengths_N, ranks)
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all((np.diff(lengths_N[share]) <= 0).all() for share in shares)
    if count > 50:
        assert efficiency(np.array([[lengths_N[share].sum()] for share in shares])) > 0.97


def test_windows_are_drawn_without_a_look_at_lengths():
    """Mean lengths of 2,000 windows spread as means of random draws do, neither less (as sorting the set would make them) nor more;
    and each window is the next rows of the permutation, whatever their lengths are."""
    shape = WindowShape(4, 2, 2)
    lengths_N = lengths(0, 2000 * shape.size)
    sampler = WindowSampler(lengths_N, shape, shuffle=True, seed=0)
    windows = [[draw.row for draw in window] for window in sampler.windows()]
    order = torch.randperm(len(lengths_N), generator=torch.Generator().manual_seed(0))
    assert np.concatenate(windows).tolist() == order.tolist()
    dealt = [draw.row for draw in sampler]
    assert all(
        sorted(dealt[i * shape.size : (i + 1) * shape.size]) == sorted(window) for i, window in enumerate(windows)
    )
    means = np.array([lengths_N[window].mean() for window in windows])
    expected = lengths_N.std() / np.sqrt(shape.size)
    assert means.std() == pytest.approx(expected, rel=0.06)  # four times its own standard error
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.09
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.09


def test_positions_of_a_pair():
    lengths_N3 = np.array([[10, 3, 5]])
    assert pair_lengths(lengths_N3, shared_prompt=True, end_to_end=False) == 18
    assert pair_lengths(lengths_N3, shared_prompt=False, end_to_end=True) == 28
    assert pair_lengths(lengths_N3, shared_prompt=False, end_to_end=False) == 30


def test_parts_within_a_number_of_tokens():
    def cut(*tokens, most, padded=False):
        return [tokens[part] for part in cut_by_tokens(tokens, most, padded=padded)]

    assert cut(9, 5, 4, 3, 2, most=9) == [(9,), (5, 4), (3, 2)]
    assert cut(9, 5, 4, 3, 2, most=10, padded=True) == [(9,), (5, 4), (3, 2)]
    assert cut(12, 1, most=9) == [(12,), (1,)] and cut(most=9) == []
