"""The trunk server: gRPC in front (service.py), the engine that computes (engine.py), who may come in (admission.py).

`build.py` puts them together; `others.py` hands on what asks for other load and process flags.
"""

from splitlearn.runtime import environment, home

home.settle()  # before libraries are imported, which ask for a home folder
environment.tell()
