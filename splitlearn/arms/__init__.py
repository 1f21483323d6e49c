"""Arms in worker processes, and the comparison of two."""
