"""Attacks: projected ascent on a per-example score. One file each; found by walking this package."""
