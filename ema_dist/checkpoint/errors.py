"""The error that a bad checkpoint raises."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or unreadable; the message names the checkpoint and the problem."""
