"""The page."""

from splitlearn.runtime import environment

environment.set_defaults()  # before gRPC is loaded
