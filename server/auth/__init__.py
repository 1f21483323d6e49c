"""Who may come in: TLS, tokens, quotas."""
