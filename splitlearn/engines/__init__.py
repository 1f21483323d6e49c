"""Engines of a stage beside torch. A module imports its library, and is imported only where its engine is chosen."""
