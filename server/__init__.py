"""The trunk server: gRPC in front (service.py), processes that compute behind it (engine.py)."""
