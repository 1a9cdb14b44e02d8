"""Distributed adversarial training of image classifiers. Start at `docs/architecture.md`."""

__version__ = "0.1.0"
