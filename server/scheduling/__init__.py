"""Which sessions get in, and whose steps share a forward."""
