"""Command line of querydet_jax.commands.train; see `python train.py --help`."""

from querydet_jax.cli import run
from querydet_jax.commands import train

if __name__ == "__main__":
    run(train)
