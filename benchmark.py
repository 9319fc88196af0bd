"""Benchmarks; see `python benchmark.py --help`."""

from querydet_jax.benchmark.main import main
from querydet_jax.cli import run

if __name__ == "__main__":
    run(main)
