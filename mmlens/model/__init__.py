"""The hooked model: its modules, hook points, weights, text and generation."""
