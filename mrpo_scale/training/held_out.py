"""What every model of a run says of every held-out pair, on disk: comparisons between runs are paired, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class HeldOutScores:
    """Log-probs of N held-out pairs, sorted by key; the last axis is (chosen, rejected)."""

    names: Sequence[str]  #: of the K references that the run loaded, the anchor's first
    row_keys: np.ndarray  #: [N] S16, see tokenization.row_key
    policy_logps_N2: np.ndarray
    ref_logps_KN2: np.ndarray

    @classmethod
    def joined(cls, pieces: Sequence[HeldOutScores]) -> HeldOutScores:
        keys = np.concatenate([piece.row_keys for piece in pieces])
        order = np.argsort(keys, kind="stable")
        return cls(
            pieces[0].names,
            keys[order],
            np.concatenate([piece.policy_logps_N2 for piece in pieces])[order],
            np.concatenate([piece.ref_logps_KN2 for piece in pieces], axis=1)[:, order],
        )

    def select(self, row_keys: np.ndarray) -> HeldOutScores:
        """The pairs with these keys, in their order. All of them must be here."""
        at = np.searchsorted(self.row_keys, row_keys)
        return replace(
            self,
            row_keys=self.row_keys[at],
            policy_logps_N2=self.policy_logps_N2[at],
            ref_logps_KN2=self.ref_logps_KN2[:, at],
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            names=np.array(list(self.names)),
            row_keys=self.row_keys,
            policy_logps=self.policy_logps_N2,
            ref_logps=self.ref_logps_KN2,
        )

    @classmethod
    def load(cls, path: Path) -> HeldOutScores:
        """Raises OSError or ValueError where the file is missing or damaged."""
        with np.load(path) as arrays:
            return cls(arrays["names"].tolist(), arrays["row_keys"], arrays["policy_logps"], arrays["ref_logps"])
