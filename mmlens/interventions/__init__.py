"""What to do with an activation (`functions`), and where (`intervention`)."""
