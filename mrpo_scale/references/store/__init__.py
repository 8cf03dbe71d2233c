"""The score cache on disk: what a reference is, its part files, and who may read them."""
