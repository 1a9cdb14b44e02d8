"""The training loop, and what it needs: a step, callbacks, checkpoints, optimizers, schedules."""
