"""Rows whose scores tell which row they are of, and stores to keep them in; shared by the tests of the cache."""

import hashlib

import numpy as np

from mrpo_scale.references.store.cache import ReferenceStore
from mrpo_scale.references.store.identity import ReferenceIdentity

PARTS = {
    "weights": {"model.safetensors": "ab" * 32},
    "config": "cd" * 32,
    "text": "ef" * 32,
    "dtype": "float32",
    "scoring": 1,
}
IDENTITY = ReferenceIdentity("calm", PARTS, "models/calm")


def keys(start, stop):
    """Keys in no order. Every 16th ends in a zero byte and every 256th in two, which numpy strips from single elements."""
    digests = [hashlib.sha256(i.to_bytes(8, "little")).digest() for i in range(start, stop)]
    raw = [d[:15] + bytes([i % 16]) if i % 256 else d[:14] + b"\0\0" for i, d in enumerate(digests, start)]
    return np.frombuffer(b"".join(raw), dtype="S16")


def scores(start, stop, shift=0.0):
    """Log-probs and token counts that name their row; ``shift`` tells writers apart."""
    i = np.arange(start, stop)
    logps = -np.stack([1 + i + shift, 2 + 2 * i + shift], axis=1).astype(np.float32)
    return logps, np.stack([1 + i % 7, 2 + i % 5], axis=1).astype(np.int32)


def rows(start, stop, shift=0.0):
    return keys(start, stop), *scores(start, stop, shift)


def new_store(root, wanted=None):
    store = ReferenceStore(root, IDENTITY, wanted)
    store.prepare_to_write()
    return store


def opened(root, identity=IDENTITY):
    store = ReferenceStore(root, identity)
    store.refresh()
    return store


def assert_holds(store, start, stop, shift=0.0):
    got, (logps, tokens) = store.lookup(keys(start, stop)), scores(start, stop, shift)
    assert got.found_N.all()
    np.testing.assert_array_equal(got.logps_N2, logps)
    np.testing.assert_array_equal(got.tokens_N2, tokens)
