"""`querydet benchmark` in the checkout; see `python benchmark.py --help`."""

from querydet_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("benchmark")
