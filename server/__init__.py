"""The trunk server: gRPC in front (service.py), the engine that computes (engine.py), who may come in (admission.py).

`build.py` puts them together; `others.py` hands on what asks for other load and process flags.
"""

import os

# A pool of threads that spins while it has nothing to do takes the cores from the client on the same machine. OpenMP
# reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
