"""Command line of querydet_jax.commands.evaluate; see `python eval.py --help`."""

from querydet_jax.cli import run
from querydet_jax.commands import evaluate

if __name__ == "__main__":
    run(evaluate)
