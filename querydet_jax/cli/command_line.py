"""Command lines: arguments to configuration, errors to one line. Commands call these and print."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import jax
import tyro

from querydet_jax.config import Config, check, load_config
from querydet_jax.config.loading import config_path
from querydet_jax.inference.export.artifact import ArtifactError
from querydet_jax.runtime import host_failures, machine
from querydet_jax.runtime.errors import ConfigError, Preempted, QueryDetError
from querydet_jax.runtime.files import cannot_write

Arguments = TypeVar("Arguments")


def parse(
    kind: type[Arguments], description: str, *, words: Sequence[str] | None = None, program: str = ""
) -> tuple[Arguments, Config, str]:
    """The command's own arguments, the configuration with its overrides, and the source it came from.

    The first word of the command line names a configuration file or a run folder; every field of the
    configuration is a flag by its dotted name (``--train.steps 100``), whose default is the
    configuration's own value. ``kind`` is a dataclass whose fields all have defaults. A command of a
    group gives its own part of the command line, ``words``, and its ``program``, the words before.
    """
    words, program = sys.argv[1:] if words is None else list(words), program or Path(sys.argv[0]).name
    source = words[0] if words and not words[0].startswith("-") else None
    if source is None and not any(word in ("-h", "--help") for word in words):
        raise QueryDetError(
            f"{program}: name a configuration file (configs/...) or a run folder first; --help explains"
        )
    default = load_config(config_path(source)) if source is not None else Config()
    # One flat set of flags: the command's own and the configuration's, without a prefix for either.
    flat = tyro.conf.arg(name="")
    both = dataclasses.make_dataclass("both", [("command", Annotated[kind, flat]), ("config", Annotated[Config, flat])])
    parsed: Any = tyro.cli(
        both,
        args=words[1:] if source is not None else words,
        default=both(kind(), default),
        prog=f"{program} {source or 'CONFIG_OR_RUN'}",
        description=description,
    )
    arguments, config = parsed.command, parsed.config
    check(config)
    return arguments, config, source or ""


def parse_for_artifact(kind: type[Arguments], description: str) -> Arguments:
    """The command's own arguments, where ``--artifact`` has the model: a run, or a field of its configuration, is
    refused, since what it would change is compiled in."""
    program = Path(sys.argv[0]).name
    arguments, rest = tyro.cli(kind, args=sys.argv[1:], prog=program, description=description, return_unknown_args=True)
    if rest:
        word = rest[0].split("=")[0]
        if not word.startswith("-"):
            raise ConfigError(f"{word}: --artifact names the model already; leave out either of the two")
        if word[2:].replace("-", "_").split(".")[0] in {field.name for field in dataclasses.fields(Config)}:
            raise ConfigError(f"{word}: fixed in an artifact; give it to export.py and export again, or give a run")
        raise ConfigError(f"{word}: unknown option; {program} --help lists them")
    return arguments


def run(main: Callable[[], None]) -> None:
    """Call a command; errors that bad input can cause become one line and exit status 2."""
    machine.restart_with_huge_pages()
    # force: libraries imported by now have set up handlers of their own.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("querydet_jax").setLevel(logging.INFO)
    machine.keep_compiled_programs()
    try:
        main()
    except Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(143)  # as a shell reports SIGTERM
    except (QueryDetError, ArtifactError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # Who read what is printed (| head) has gone. Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except OSError as error:
        if not cannot_write(error):
            raise
        _fail(f"{error.filename or 'an output'} cannot be written ({error.strerror})", 2)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        line = host_failures.lost_host(error)
        if line is None:
            traceback.print_exc()
        _fail(line or f"{type(error).__name__} ({(str(error).splitlines() or [''])[0][:200]})", 2 if line else 1)


def _fail(line: str, status: int) -> NoReturn:
    print("interrupted" if status == 130 else f"error: {line}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        host_failures.leave(status)
    sys.exit(status)
