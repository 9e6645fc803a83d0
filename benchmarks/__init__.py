"""Scripts that measure; docs/benchmarks.md holds their results."""
