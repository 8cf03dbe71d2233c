"""mrpo_scale: Multi-Reference Preference Optimization of one policy against K frozen references, at scale.

from mrpo_scale import MRPOConfig, MRPOTrainer
"""

import os
from typing import Any

# Large CPU tensors on huge pages: fresh memory cost a third of a step's processor time in page faults of 4 KiB
# (docs/performance.md). torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = [
    "MRPOConfig",
    "MRPOTrainer",
    "MultiReferenceReward",
    "Objective",
    "RewardModel",
    "preference_loss",
    "prepare_launch",
]

_WHERE = {
    "MRPOConfig": "mrpo_scale.config.keys",
    "MRPOTrainer": "mrpo_scale.training.trainer",
    "MultiReferenceReward": "mrpo_scale.references.multi_reference_reward",
    "Objective": "mrpo_scale.objective",
    "RewardModel": "mrpo_scale.references.reward",
    "preference_loss": "mrpo_scale.objective",
    "prepare_launch": "mrpo_scale.config.launcher",
}


def __getattr__(name: str) -> Any:
    """Import on first use: transformers and DeepSpeed take seconds that `mrpo --help` should not."""
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
