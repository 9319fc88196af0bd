"""Load, override and save configurations.

An experiment is one Python file that defines ``config = Config(...)`` and ``card = Card(...)`` (see ``configs/``).
Any field can be overridden by its dotted name, in Python (``load_config(path, {"train.steps": 100})``) or on the
command line (``querydet train CARD --train.steps 100``). A run saves its full configuration as ``config.json`` in
its folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from querydet_jax.config.card import Card
from querydet_jax.config.cards import find_card
from querydet_jax.config.fields import from_dict, replace_field
from querydet_jax.config.rules import check
from querydet_jax.config.schema import Config
from querydet_jax.config.zoo import CONFIG, zoo_folder
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import write_json
from querydet_jax.runtime.reading import read_json
from querydet_jax.runtime.stores import StoreError, as_path, local_copy

Group = TypeVar("Group")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a card by name, an experiment file (``.py`` with a ``config``) or a run's saved configuration.

    Args:
      path: the card's name, such as ``coco_querydet_r50``, the file, the run folder, or the name of packaged weights.
      overrides: dotted field names to values, e.g. ``{"model.num_classes": 10}``.

    Raises:
      ConfigError: the file is missing or has no ``config``, or a key, type or value is wrong.
    """
    path = config_path(path)
    if path.suffix == ".json":
        fields = read_json(path, ConfigError)
    else:
        config = _run(path).get("config")
        if not isinstance(config, Config):
            raise ConfigError(f"{path}: does not define `config = Config(...)`; see configs/demo.py")
        with _user_code(path):
            fields = dataclasses.asdict(config)
    # Check Python files like JSON, because dataclasses do not check the types of their fields.
    return override(from_dict(Config, fields, where=str(path)), overrides or {})


def load_card(path: str | Path) -> Card:
    """Read the ``card`` of an experiment file (``.py``).

    Raises:
      ConfigError: the file is missing or has no ``card``, or the card contradicts itself.
    """
    path = config_path(path)
    card = _run(path).get("card")
    if not isinstance(card, Card):
        raise ConfigError(f"{path}: does not define `card = Card(...)`; see configs/demo.py")
    return card


def _run(path: Path) -> dict[str, Any]:
    """Run an experiment file and return its variables."""
    with _user_code(path):
        with local_copy(path) as here:
            return runpy.run_path(str(here))


@contextlib.contextmanager
def _user_code(path: Path) -> Iterator[None]:
    """Turn whatever the block raises into a ConfigError: a user's program, and values in it, can raise anything."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{path}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}; fix the file (field names "
            "are in querydet_jax/config/schema.py)"
        ) from None


def override(config: Group, changes: dict[str, Any]) -> Group:
    """Return a copy of a configuration (or of one of its groups) with dotted fields replaced.

    Raises:
      ConfigError: a key is unknown or a value has another type; for a whole ``Config``, fields contradict each other.
    """
    for key, value in changes.items():
        config = replace_field(config, key, value, Config)
    if isinstance(config, Config):
        check(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the full configuration as JSON, atomically."""
    write_json(path, dataclasses.asdict(config), indent=2)


def config_path(source: str | Path) -> Path:
    """Return the configuration file of ``source``: a run folder, a configuration file, a card's name or that of
    packaged weights.

    Raises:
      ConfigError: it is none of these.
    """
    packaged = zoo_folder(source)
    if packaged is not None:
        return packaged / CONFIG
    name, source = str(source), as_path(source)
    try:
        is_folder, exists = source.is_dir(), source.exists()
    except StoreError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{name[:200]}: {error.strerror}; give a card's name, a configuration file or a run folder"
        ) from None
    if is_folder:
        path = source / "config.json"
        if not path.is_file():
            raise ConfigError(f"{source}: no config.json in this folder; give a folder that `querydet train` wrote")
        return path
    return source if exists else find_card(name)
