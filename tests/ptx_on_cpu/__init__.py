"""Runs compiled kernels on the CPU, from their PTX; see docs/profile.md."""
