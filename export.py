"""Command line of querydet_jax.export.command; see `python export.py --help`."""

from querydet_jax.cli import run
from querydet_jax.export.command import export

if __name__ == "__main__":
    run(export)
