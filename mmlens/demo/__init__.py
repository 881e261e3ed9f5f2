"""The embedded demo model: its weights, its images, its questions."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
VARIANTS = ("demo", "demo-tuned")
"""Names of the embedded models, as `from_pretrained` takes them."""


def is_embedded(name: str | Path) -> bool:
    """Return whether a name is an embedded model's, and neither a folder's nor on the hub."""
    return str(name) in VARIANTS
