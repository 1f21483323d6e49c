"""splitlearn: run a causal language model whole, or split across a gRPC trunk server, and measure both."""

__version__ = "0.1.0"
