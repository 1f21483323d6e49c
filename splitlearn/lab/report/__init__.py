"""Findings as tables, charts and files."""
