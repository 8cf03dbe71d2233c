"""Per-response log-probs straight from hidden states, and the virtual reference. Imports torch (and later triton) only."""

from mrpo_kernels.sequence_logps import sequence_logps
from mrpo_kernels.virtual_reference import CombinedReferences, combine_references

__all__ = ["CombinedReferences", "combine_references", "sequence_logps"]
