"""The decode loop over a list of stages."""
