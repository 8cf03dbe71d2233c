"""16-byte hashes (numpy ``S16``) by the million: sorted and found as two integers each.

numpy compares such strings byte by byte, in a loop that calls a function for each pair, and trailing NULs end them: sorting three
million takes half a minute, and `np.unique`, which hashes them, minutes. The order of big-endian halves is the order of the bytes.
"""

from __future__ import annotations

import numpy as np

_NARROW = 32  #: so many times fewer keys than the table has: it is not copied to look them up


def halves(keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [N] each, of the first and of the last eight bytes; views, big-endian and strided."""
    both_N2 = np.ascontiguousarray(keys_N).view(">u8").reshape(-1, 2)
    return both_N2[:, 0], both_N2[:, 1]


def sort_order(keys_N: np.ndarray) -> np.ndarray:
    """[N] indices that sort keys by their bytes; of equal keys in the order in which they stand."""
    first_N, last_N = halves(keys_N)
    first_N = first_N.astype(np.uint64)
    order_N = np.argsort(first_N, kind="stable")
    first_N = first_N[order_N]
    same = first_N[1:] == first_N[:-1]
    if same.any():  # equal keys, or, of hashes almost never, keys with one first half
        tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
        group = order_N[tied]
        order_N[tied] = group[np.lexsort((last_N[group].astype(np.uint64), first_N[tied]))]
    return order_N


def is_ascending(keys_N: np.ndarray) -> bool:
    """Whether keys are sorted, and none stands twice."""
    first_N, last_N = (half.astype(np.uint64) for half in halves(keys_N))
    before, after = first_N[:-1], first_N[1:]
    return bool(((before < after) | ((before == after) & (last_N[:-1] < last_N[1:]))).all())


def is_first(sorted_N: np.ndarray) -> np.ndarray:
    """Bool [N]: of equal keys that stand together, the first."""
    first = np.ones(len(sorted_N), dtype=bool)
    a_N, b_N = halves(sorted_N)
    first[1:] = (a_N[1:] != a_N[:-1]) | (b_N[1:] != b_N[:-1])
    return first


def distinct(keys_N: np.ndarray) -> np.ndarray:
    """The keys, sorted, each once; ``keys_N`` itself where it is that."""
    if is_ascending(keys_N):
        return keys_N
    keys_N = keys_N[sort_order(keys_N)]
    return keys_N[is_first(keys_N)]


def find(sorted_M: np.ndarray, keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in ascending keys each key stands, and whether it does. Positions of absent keys mean nothing."""
    if not len(sorted_M) or not len(keys_N):
        return np.zeros(len(keys_N), dtype=np.intp), np.zeros(len(keys_N), dtype=bool)
    table_M, tail_M = halves(sorted_M)
    wanted_N, tail_N = halves(keys_N)
    wanted_N = wanted_N.astype(np.uint64)
    if len(keys_N) * _NARROW > len(sorted_M):
        at_N = table_M.astype(np.uint64).searchsorted(wanted_N)
    else:
        at_N = _bisect(table_M, wanted_N)
    at_N = np.minimum(at_N, len(sorted_M) - 1)
    near_N = table_M[at_N] == wanted_N
    hit_N = near_N & (tail_M[at_N] == tail_N)
    for i in np.flatnonzero(near_N & ~hit_N):  # another key with the same first half: of hashes almost never
        at_N[i] = min(sorted_M.searchsorted(keys_N[i]), len(sorted_M) - 1)
        hit_N[i] = sorted_M[at_N[i]] == keys_N[i]
    return at_N, hit_N


def contains(keys_N: np.ndarray, among_M: np.ndarray) -> np.ndarray:
    """Bool [N]: whether each key is one of ``among_M``, in any order."""
    return find(distinct(among_M), keys_N)[1]


def _bisect(table_M: np.ndarray, wanted_N: np.ndarray) -> np.ndarray:
    """Where the first entry of a sorted table stands that is not below each number. Reads of the table what it looks at."""
    low_N, high_N = np.zeros(len(wanted_N), dtype=np.intp), np.full(len(wanted_N), len(table_M), dtype=np.intp)
    while (low_N < high_N).any():
        middle_N = (low_N + high_N) // 2
        below_N = table_M[np.minimum(middle_N, len(table_M) - 1)] < wanted_N
        open_N = low_N < high_N
        low_N = np.where(open_N & below_N, middle_N + 1, low_N)
        high_N = np.where(open_N & ~below_N, middle_N, high_N)
    return low_N
