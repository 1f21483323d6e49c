"""Modules that flags put in the place of a model's own."""
