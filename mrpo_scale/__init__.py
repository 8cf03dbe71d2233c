"""mrpo_scale: Multi-Reference Preference Optimization of one policy against K frozen references, at scale."""
