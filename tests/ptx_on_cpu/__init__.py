"""Runs compiled kernels on the CPU, from their PTX; see docs/ptx_on_cpu.md."""
