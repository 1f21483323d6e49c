"""The trunk server.

service.py has the gRPC methods, auth/ access control. build.py builds the parts, with the engine and admission of
splitlearn/scheduling/; program.py runs them. variants.py runs servers for other load and process flags.
"""

from splitlearn.runtime import environment, home

home.settle()  # before libraries look for a home folder
environment.set_defaults()
