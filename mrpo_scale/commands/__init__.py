"""`mrpo train`, `score`, `inspect`: from command-line words to a finished job."""
