"""Text and images to tokens, pixels and named positions, in one index space."""
