"""Checkpoints of files to models, and back: `load`, `saving`, `parity`."""
