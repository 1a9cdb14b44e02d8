"""Callbacks of the training loop, one a file. Order: averaging, monitor, cost (of a search's trials), log,
checkpointing (which saves the state of all)."""
