"""Command line of querydet_jax.cli.commands.train; see `python train.py --help`."""

from querydet_jax.cli.command_line import run
from querydet_jax.cli.commands import train

if __name__ == "__main__":
    run(train)
