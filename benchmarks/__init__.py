"""Is it better than the obvious way? Epochs timed against it, and curves for schedulers to search."""
