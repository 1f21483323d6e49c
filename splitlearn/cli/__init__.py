"""The command line, a module a command."""

from splitlearn.runtime import environment

environment.set_defaults()  # before gRPC and torch are loaded
