"""Counts, bounds and estimates of compiled kernels, without a card; see docs/profile.md."""
