"""Windows: every row once, fillers of weight 0, the same pairs per step whatever the split, batches by length."""

import torch
from mrpo_kernels import CombinedReferences
from torch.utils.data import BatchSampler

from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.data.window import PairExample, WeightedPairs, WindowSampler
from mrpo_scale.logps.micro_batches import policy_batches


class Rows:
    """Pairs whose prompt tells the row."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def tokens(self, row):
        return (PairTokens([1] * (row + 1), [2] * (row % 3 + 1), [3]),)


def test_every_row_once_and_fillers_to_whole_windows():
    sampler = WindowSampler(19, 4, shuffle=True, seed=3)
    examples = [WeightedPairs(Rows(19))[i] for i in sampler]
    assert len(examples) == len(sampler) == 20
    assert sorted(e.row for e in examples if e.weight == 1) == list(range(19))
    assert [e.weight for e in examples] == [1.0] * 19 + [0.0]


def test_drop_last_leaves_the_unfilled_window_out():
    indices = list(WindowSampler(19, 4, shuffle=False, seed=0, drop_last=True))
    assert indices == list(range(16))


def test_epochs_differ_and_repeat():
    sampler = WindowSampler(19, 4, shuffle=True, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_window_is_the_same_pairs_whatever_the_split():
    """Accelerate deals micro-batches to ranks in turn: windows of 4 = 1 rank x 4, 2 ranks x 2 or 2 ranks x one batch of 2."""

    def windows(ranks, accumulation, batch_size):
        batches = list(BatchSampler(WindowSampler(19, 4, shuffle=True, seed=3), batch_size, drop_last=False))
        per_window = ranks * accumulation
        assert len(batches) % per_window == 0
        return [{i for batch in batches[w : w + per_window] for i in batch} for w in range(0, len(batches), per_window)]

    assert windows(1, 4, 1) == windows(2, 2, 1) == windows(2, 1, 2)


def test_micro_batches_hold_pairs_of_similar_length_with_their_own_scores():
    rows = [5, 0, 9, 1, 8, 4]
    examples = [PairExample(row, float(row != 9), Rows(10).tokens(row)) for row in rows]
    row_P = torch.tensor(rows, dtype=torch.float32)
    row_P2, row_KP, row_KP2 = row_P[:, None].expand(-1, 2), row_P.expand(3, -1), row_P[None, :, None].expand(3, -1, 2)
    references = CombinedReferences(row_KP2, row_P2, row_KP, row_P2, row_KP2)
    batches = policy_batches(examples, references, 3, shared_prompt=True, pad_token_id=0)
    assert [batch.rows for batch in batches] == [(8, 9), (5, 4), (1, 0)]
    for batch in batches:
        for values in vars(batch.references).values():
            own_P2 = values.movedim(1, 0) if len(values) == 3 else values
            assert own_P2.flatten(1).tolist() == [[float(row)] * own_P2[0].numel() for row in batch.rows]
        assert batch.weight_P.tolist() == [float(row != 9) for row in batch.rows]
        assert batch.pairs.num_pairs == 2
