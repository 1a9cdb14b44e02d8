"""Callbacks of the training loop, one a file. Order: averaging, monitor, log, checkpointing (which saves the
state of all)."""
