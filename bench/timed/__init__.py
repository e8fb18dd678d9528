"""The ops' workloads under pytest: ``pytest bench/ --benchmark-only``, and a card's limits."""
