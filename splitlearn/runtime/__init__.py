"""The process and the machine it runs on: memory, threads, children, progress."""
