"""KV caches of one session, and the pool for many."""
