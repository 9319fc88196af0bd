"""Benchmarks; see `python benchmark.py --help`."""

from benchmarks.main import main
from querydet_jax.cli.command_line import run

if __name__ == "__main__":
    run(main)
