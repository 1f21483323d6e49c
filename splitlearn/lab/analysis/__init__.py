"""From trials to findings."""
