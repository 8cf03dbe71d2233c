"""One optimizer step, and what is measured on it."""
