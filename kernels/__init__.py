"""Triton kernels, one file an op; installed as ``cmpose.kernels``. They know nothing of ops."""
