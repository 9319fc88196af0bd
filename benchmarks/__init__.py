"""The benchmarks of `benchmark.py`, one file per command; not part of the installed package."""
