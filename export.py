"""Command line of querydet_jax.inference.export.command; see `python export.py --help`."""

from querydet_jax.cli.command_line import run
from querydet_jax.inference.export.command import export

if __name__ == "__main__":
    run(export)
