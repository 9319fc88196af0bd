"""Command line of querydet_jax.cli.commands.predict; see `python predict.py --help`."""

from querydet_jax.cli.command_line import run
from querydet_jax.cli.commands import predict

if __name__ == "__main__":
    run(predict)
