"""Measurements behind the claims in docs/performance.md: `python -m benchmarks.run`."""
