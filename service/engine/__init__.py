"""Continuous batching over a paged KV cache; ``engine.py`` is the door."""
