"""Measurements against what a user would otherwise run; ratios from one run come first."""
