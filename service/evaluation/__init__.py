"""Measures methods on the engine itself: tasks, text, cost; one cell per method and length."""
