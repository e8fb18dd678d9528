"""The ops' workloads under pytest: ``pytest bench/ --benchmark-only``."""
