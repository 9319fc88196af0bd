"""Command line of querydet_jax.commands.predict; see `python predict.py --help`."""

from querydet_jax.cli import run
from querydet_jax.commands import predict

if __name__ == "__main__":
    run(predict)
