"""Access control: TLS, tokens, quotas."""
