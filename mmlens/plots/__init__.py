"""Pictures of results: interactive figures (plotly), and heatmaps for the terminal (rich)."""
