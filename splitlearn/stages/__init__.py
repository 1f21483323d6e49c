"""A run of consecutive layers: loaded, and stepped."""
