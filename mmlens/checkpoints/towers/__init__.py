"""Vision towers that a checkpoint names, or that open_clip has."""
