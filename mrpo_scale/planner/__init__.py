"""`mrpo check`: what a run will read, hold, compute and send, from configs and data alone."""
