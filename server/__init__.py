"""The trunk server.

service.py has the gRPC methods, scheduling/ the engine and admission, auth/ access control. build.py puts them
together; variants.py runs servers for other load and process flags.
"""

from splitlearn.runtime import environment, home

home.settle()  # before libraries look for a home folder
environment.set_defaults()
