"""Hugging Face models under our attention; ``attention.py`` is the seam."""
