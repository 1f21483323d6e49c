"""The client's side of the wire: a remote stage, its sessions, failover."""
