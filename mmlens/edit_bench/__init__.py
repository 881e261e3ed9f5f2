"""Editing methods side by side, layer by layer, or one edit after another."""
