"""Trunk servers on Ray: Ray places, watches and restarts them; clients talk to them by the trunk's own protocol."""
