"""Pairs to reference log-probs [K, P, 2]: live in shard groups, or from the store."""
