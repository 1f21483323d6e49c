"""KV caches of one session, and the pool of many."""
