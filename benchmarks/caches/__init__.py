"""What `benchmarks.index_peers` compares: one file a library, run by an interpreter that has it."""
