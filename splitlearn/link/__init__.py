"""Emulated links between client and trunk: their words, the proxy that holds bytes back, and what they predict."""
