"""What the benchmarks share: the machine, the record of results, an object store."""
