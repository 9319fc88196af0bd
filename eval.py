"""Command line of querydet_jax.cli.commands.evaluate; see `python eval.py --help`."""

from querydet_jax.cli.command_line import run
from querydet_jax.cli.commands import evaluate

if __name__ == "__main__":
    run(evaluate)
