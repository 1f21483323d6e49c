"""The trunk server: gRPC in front (service.py), the engine that computes (server/scheduling/engine.py), who may come in
(server/scheduling/admission.py).

`build.py` puts them together; `server/variants.py` hands on what asks for other load and process flags.
"""

from splitlearn.runtime import environment, home

home.settle()  # before libraries are imported, which ask for a home folder
environment.set_defaults()
