"""What `benchmark.py` runs: one file a table or figure."""
