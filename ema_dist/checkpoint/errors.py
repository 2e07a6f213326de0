"""What is wrong with a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not one that can be read; the message names it and what is wrong."""
