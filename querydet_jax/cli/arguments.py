"""Command-line words to a command's own arguments and a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from querydet_jax.config import Config, check, config_path, load_config
from querydet_jax.config.zoo import is_packaged, zoo_folder
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.runtime.stores import as_path

Arguments = TypeVar("Arguments")
SOURCE = "CARD_OR_RUN"


def parse(
    kind: type[Arguments], description: str, words: Sequence[str], program: str, *, source: str = SOURCE
) -> tuple[Arguments, Config, Path]:
    """Return the command's own arguments, the configuration with its overrides, and the file or folder it came from.

    The first word names a card (see `querydet cards`), a configuration file, a run folder or packaged weights. Every
    field of the configuration is a flag by its dotted name (``--train.steps 100``), whose default is the
    configuration's value.

    Args:
      kind: dataclass of the command's own arguments; all fields have defaults.
      source: what the help calls the first word.

    Raises:
      QueryDetError: no source; an unknown card, field or value.
    """
    name = source_of(words)
    if name is None and not wants_help(words):
        raise QueryDetError(
            f"{program}: name a card, a configuration file or a run folder first; `querydet cards` lists the cards"
        )
    path = Path() if name is None else config_path(name)
    default = Config() if name is None else load_config(path)
    # One flat set of flags: the command's own and the configuration's, without a prefix for either.
    flat = tyro.conf.arg(name="")
    both = dataclasses.make_dataclass("both", [("command", Annotated[kind, flat]), ("config", Annotated[Config, flat])])
    parsed: Any = tyro.cli(
        both,
        args=words if name is None else words[1:],
        default=both(kind(), default),
        prog=f"{program} {name or source}",
        description=description,
    )
    check(parsed.config)
    packaged = None if name is None else zoo_folder(name)
    given = packaged or (as_path(name) if name is not None and as_path(name).is_dir() else path)
    return parsed.command, parsed.config, given


def results_folder(source: Path, config: Config) -> Path:
    """Return where a command writes: a run's own folder, or runs/NAME for a card and for packaged weights."""
    return source if source.is_dir() and not is_packaged(source) else Path("runs") / config.name


def source_of(words: Sequence[str]) -> str | None:
    """Return the first word, unless it is a flag."""
    return words[0] if words and not words[0].startswith("-") else None


def wants_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def parse_alone(kind: type[Arguments], description: str, words: Sequence[str], program: str, fixed: str) -> Arguments:
    """Return a command's own arguments where there is no configuration to set.

    Args:
      fixed: why a field of the configuration is refused, and what to do instead.

    Raises:
      ConfigError: a field of the configuration, or an unknown option.
    """
    arguments, rest = tyro.cli(kind, args=list(words), prog=program, description=description, return_unknown_args=True)
    if rest:
        word = rest[0].split("=")[0]
        if word.lstrip("-").replace("-", "_").split(".")[0] in {field.name for field in dataclasses.fields(Config)}:
            raise ConfigError(f"{word}: {fixed}")
        raise ConfigError(f"{word}: unknown option; {program} --help lists them")
    return arguments
