"""Used by all benchmarks: the machine, the record of results, an S3 server."""
