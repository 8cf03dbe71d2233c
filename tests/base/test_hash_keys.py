"""Keys are sorted and found as numpy's strings are, by their bytes: random ones, equal ones, and ones that share half of theirs."""

import numpy as np
import pytest

from mrpo_scale.base import hash_keys


def some_keys(kind, n=500):
    rng = np.random.default_rng(0)
    both = rng.integers(0, 256, size=(n, 16), dtype=np.uint8)
    if kind == "one first half":
        both[:, :8] = 7
    elif kind == "few":  # each stands many times, some with NULs at their end
        both = both[rng.integers(0, 9, size=n)]
        both[::3, 12:] = 0
    elif kind == "zeros and a":
        both = rng.choice(np.frombuffer(b"\0a", dtype=np.uint8), size=(n, 16))
    return np.ascontiguousarray(both).view("S16").ravel()


KINDS = ["random", "one first half", "few", "zeros and a"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_the_bytes_and_stable(kind):
    keys = some_keys(kind)
    expected = sorted(range(len(keys)), key=lambda i: (keys[i : i + 1].tobytes(), i))
    assert hash_keys.sort_order(keys).tolist() == expected
    distinct = hash_keys.distinct(keys)
    assert [distinct[i : i + 1].tobytes() for i in range(len(distinct))] == sorted(
        {keys[i : i + 1].tobytes() for i in range(len(keys))}
    )
    assert hash_keys.distinct(distinct) is distinct, "no copy of what is sorted"
    assert hash_keys.is_ascending(distinct) and not hash_keys.is_ascending(distinct[::-1].copy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [3, 700])  # a window's few, by steps of a bisection; as many as the table has
def test_a_key_is_found_where_it_stands(kind, asked):
    table = hash_keys.distinct(some_keys(kind)[::2].copy())
    keys = np.resize(some_keys(kind)[::-1], asked)
    at, hit = hash_keys.find(table, keys)
    there = {table[i : i + 1].tobytes(): i for i in range(len(table))}
    assert hit.tolist() == [keys[i : i + 1].tobytes() in there for i in range(asked)]
    assert all(at[i] == there[keys[i : i + 1].tobytes()] for i in np.flatnonzero(hit))
    assert hash_keys.contains(keys, some_keys(kind)[::2].copy()).tolist() == hit.tolist()


def test_nothing_is_found_among_nothing():
    keys, none = some_keys("random", 3), some_keys("random", 0)
    assert not hash_keys.find(none, keys)[1].any() and len(hash_keys.find(keys, none)[1]) == 0
    assert hash_keys.distinct(none) is none
