"""Decides which sessions are admitted, and whose steps share a forward."""
