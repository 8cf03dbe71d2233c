"""What a model's name stands for: its files, config, stored names, loading, saving."""
