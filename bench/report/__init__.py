"""The generated parts of docs/performance.md: ``python -m bench.report``."""
