"""Choose the command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from querydet_jax.cli.process import run

Command = Callable[[Sequence[str], str], None]
"""``command(words, program)``: its part of the command line, and the words before, for its help."""

SUMMARIES = {
    "train": "Train a detector on all devices, of one host or several.",
    "eval": "Evaluate a trained detector, densely and with Cascade Sparse Query.",
    "predict": "Detect objects in pictures and videos.",
    "export": "Compile a trained detector into one file, or into a page for the browser.",
    "report": "Count what a data set asks of a configuration, before any training.",
    "prepare": "Write a data set once in the form that training reads fastest.",
    "score": "Score the result files of any detector.",
    "benchmark": "Measure speed and reproduce the paper's tables (in the checkout only).",
    "cards": "List the experiment cards, or print one with its full configuration.",
}


def main() -> None:
    """Run the command that the command line names: the console script `querydet`."""
    words = sys.argv[1:]
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        run(lambda: print(_help(), flush=True))  # flush: a reader that left (| head) shows here
    elif name == "--version":
        from querydet_jax import __version__

        print(f"querydet {__version__}")
    elif name in SUMMARIES:
        run_command(name, words[1:], f"querydet {name}")
    else:
        near = difflib.get_close_matches(name, SUMMARIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(SUMMARIES)}"
        print(f"error: querydet {name}: no such command; {hint}", file=sys.stderr)
        sys.exit(2)


def run_command(name: str, words: Sequence[str] | None = None, program: str = "") -> None:
    """Run a command as a process does: errors become one line and an exit status.

    Args:
      name: one of ``SUMMARIES``.
      words: its part of the command line; None: all of this process's.
      program: what its help calls it; empty: the script's name.
    """
    words = sys.argv[1:] if words is None else words
    run(lambda: load(name)(words, program or f"{name}.py"))


def load(name: str) -> Command:
    """Import a command, one of ``SUMMARIES``."""
    match name:
        case "train":
            from querydet_jax.cli.train import train as command
        case "eval":
            from querydet_jax.cli.eval import evaluate as command
        case "predict":
            from querydet_jax.cli.predict import predict as command
        case "export":
            from querydet_jax.cli.export import export as command
        case "report":
            from querydet_jax.cli.report import report as command
        case "prepare":
            from querydet_jax.cli.prepare import prepare as command
        case "score":
            from querydet_jax.cli.score import score as command
        case "benchmark":
            from querydet_jax.cli.benchmark import benchmark as command
        case "cards":
            from querydet_jax.cli.cards import cards as command
        case _:
            raise ValueError(f"no command {name!r}")
    return command


def _help() -> str:
    width = max(map(len, SUMMARIES))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        [
            "usage: querydet COMMAND ...",
            "",
            "QueryDet: detection of small objects on high-resolution features, computed only where it pays.",
            "",
            *lines,
            "",
            "querydet COMMAND --help explains a command; querydet --version prints the version.",
        ]
    )
