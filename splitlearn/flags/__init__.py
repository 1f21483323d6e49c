"""Optimization flags: the registry, and how a person selects them."""
