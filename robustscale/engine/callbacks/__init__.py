"""Callbacks of the training loop, one a file. Order: monitor, log, checkpointing (which saves the state of all)."""
