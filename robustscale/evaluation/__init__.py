"""Evaluation: which images survive which attack, and the figures that follow from it."""
