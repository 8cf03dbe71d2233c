"""The kernels' program instances in random order, with fresh memory full of NaN: a GPU promises no order and no zeros.

In Triton's interpreter, which runs one instance after the other (test_interpreter.py starts it), so a race inside an instance is
not seen.
"""

import itertools
import random
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from mrpo_kernels import combine_logps, sequence_logps, virtual_reference
from triton.runtime import interpreter

ORDERS = 20
MODES = {"epsilon_max": 0.1, "clip": "adaptive", "ref_weights": "confidence", "aggregate": "harmonic"}
CU_SEQLENS = torch.tensor([0, 1, 9, 9, 24])


@pytest.fixture
def shuffled(monkeypatch):
    """``shuffled(seed)``: from now on in this order; ``shuffled.moved``: kernel -> launches in another order than the usual one."""
    builder = interpreter.interpreter_builder
    set_dim, set_index, empty = builder.set_grid_dim, builder.set_grid_idx, torch.empty

    class Order:
        def __init__(self):
            self.moved = Counter()
            self(None)

        def __call__(self, seed):
            self.random = None if seed is None else random.Random(seed)

    order = Order()

    def set_grid_dim(*grid):
        usual = list(itertools.product(*map(range, grid)))
        places = usual if order.random is None else order.random.sample(usual, len(usual))
        order.place = dict(zip(usual, places, strict=True))
        order.moved[grid] += places != usual
        return set_dim(*grid)

    def full_of_nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *index: set_index(*order.place[index]))
    monkeypatch.setattr(torch, "empty", full_of_nan)
    return order


def heads(count):
    """Of references with unequal sizes: two tiles of tokens and of columns, three of words in the first."""
    g = torch.Generator().manual_seed(0)
    for k in range(count):
        hidden, vocabulary = 24 + 8 * k, 70 - 20 * k
        yield (
            torch.randn(24, hidden, generator=g),
            torch.randn(vocabulary, hidden, generator=g),
            torch.randint(vocabulary, (24,), generator=g),
        )


def log_probs():
    """partials_kernel and response_sums_kernel."""
    return [sequence_logps(*next(heads(1)), CU_SEQLENS, softcap=30.0, impl="triton")]


def virtual():
    """partials_kernel over two heads and virtual_reference_kernel."""
    hidden, weight, labels = zip(*heads(2), strict=True)
    return vars(virtual_reference(hidden, weight, labels, [CU_SEQLENS] * 2, **MODES, impl="triton")).values()


def combined():
    """virtual_reference_kernel from log-probs."""
    raw_KP2 = -torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(0))
    return vars(combine_logps(raw_KP2, **MODES, impl="triton")).values()


@pytest.mark.parametrize("compute", [log_probs, virtual, combined])
def test_the_same_bits_in_any_order(compute, shuffled):
    expected = [x.clone() for x in compute()]
    assert all(x.isfinite().all() for x in expected)
    for seed in range(ORDERS):
        shuffled(seed)
        for got, wanted in zip(compute(), expected, strict=True):
            assert torch.equal(got, wanted)
    launches = [count for grid, count in shuffled.moved.items() if max(grid) > 2]
    assert launches and all(count > ORDERS // 2 for count in launches)


@triton.jit
def last_instance_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


def test_an_order_that_matters_is_seen(shuffled):
    seen = set()
    for seed in range(ORDERS):
        shuffled(seed)
        out = torch.zeros(1, dtype=torch.int32)
        last_instance_kernel[(7,)](out)
        seen.add(out.item())
    assert len(seen) > 2
