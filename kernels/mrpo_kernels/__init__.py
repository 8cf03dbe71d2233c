"""Per-response log-probs straight from hidden states, and the virtual reference. Imports torch and triton only."""

from mrpo_kernels.fused_reference import combine_logps, virtual_reference
from mrpo_kernels.linear_preference_loss import LinearPreferenceLoss, linear_preference_loss
from mrpo_kernels.sequence_logps import sequence_logps
from mrpo_kernels.virtual_reference import CombinedReferences, combine_references

__all__ = [
    "CombinedReferences",
    "LinearPreferenceLoss",
    "combine_logps",
    "combine_references",
    "linear_preference_loss",
    "sequence_logps",
    "virtual_reference",
]
