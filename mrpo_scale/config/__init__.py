"""The keys of a run, recipes, and what a launcher may have done to them."""
