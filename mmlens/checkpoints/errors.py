"""What goes wrong when a checkpoint is opened."""


class CheckpointError(ValueError):
    """A checkpoint is not there, is of no known format, or does not fit; the message says which."""
