"""Scripts that measure; docs/benchmarks.md holds what they gave."""
