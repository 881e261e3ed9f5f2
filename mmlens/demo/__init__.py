"""The embedded demo model: its weights, its pictures, its questions."""
