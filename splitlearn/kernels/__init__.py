"""Functions in machine code. Imports nothing of the project, so that kept code is good until a kernel changes."""
