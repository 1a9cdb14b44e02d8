"""The exceptions that a person is meant to read."""


class InputError(Exception):
    """Something given from outside cannot be used.

    The message is one line that names what is wrong, where, and the remedy. Doors print it without a
    traceback and exit with status 2; a worker that raises it ends the run without a retry. Not a ValueError: tyro and
    pydantic take those for their own.
    """


class Diverged(RuntimeError):
    """A loss or gradient stopped being finite; the message names the step and what to change."""


class WorkersFailed(RuntimeError):
    """The workers of a run kept failing; the message ends with the last reason."""


class LoaderFailed(RuntimeError):
    """A loader gave no batch for a reason that another attempt may not meet: storage, memory, a file that was changed
    while it was read. The message names the file and the remedy."""


class Left(Exception):
    """A worker left because it was asked to; a checkpoint of where it stands is durable. Not a failure."""
