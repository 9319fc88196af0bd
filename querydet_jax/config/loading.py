"""Load, override and save configurations.

Each experiment is one Python file that defines ``config = Config(...)``, a card (see ``configs/``). Any field can be
overridden by its dotted name, from Python (``load_config(path, {"train.steps": 100})``) or on the
command line (``querydet train CARD --train.steps 100``). The full configuration of a run is saved as
``config.json`` in the run's folder and loads from there again.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any, TypeVar

from querydet_jax.config.card import Card
from querydet_jax.config.cards import find_card
from querydet_jax.config.fields import from_dict, replace_field
from querydet_jax.config.rules import check
from querydet_jax.config.schema import Config
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import write_json

Group = TypeVar("Group")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read an experiment file (``.py`` with a ``config``, or a saved ``config.json``).

    Args:
      path: the file.
      overrides: dotted field names to values, e.g. ``{"model.num_classes": 10}``.

    Raises:
      ConfigError: file absent or without a ``config``; unknown key; wrong type or value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; see configs/ for those provided")
    if path.suffix == ".json":
        try:
            fields = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not readable as JSON ({error}); restore or re-create it") from None
    else:
        config = _run(path).get("config")
        if not isinstance(config, Config):
            raise ConfigError(f"{path}: does not define `config = Config(...)`; see configs/demo.py")
        fields = dataclasses.asdict(config)
    # The same road for both: dataclasses do not look at the types that they are given.
    return override(from_dict(Config, fields, where=str(path)), overrides or {})


def load_card(path: str | Path) -> Card:
    """Read the ``card`` of an experiment file (``.py``).

    Raises:
      ConfigError: file absent, without a ``card``, or one that contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; see configs/ for those provided")
    card = _run(path).get("card")
    if not isinstance(card, Card):
        raise ConfigError(f"{path}: does not define `card = Card(...)`; see configs/demo.py")
    return card


def _run(path: Path) -> dict[str, Any]:
    """Run an experiment file and return its variables."""
    try:
        return runpy.run_path(str(path))
    except Exception as error:  # the file is a user's program: it can fail in any way
        raise ConfigError(
            f"{path}: {type(error).__name__}: {error}; fix the file (field names are in querydet_jax/config/schema.py)"
        ) from None


def override(config: Group, changes: dict[str, Any]) -> Group:
    """A copy of a configuration (or a group of one) with dotted fields replaced.

    A whole ``Config`` is then checked for fields that contradict each other.
    """
    for key, value in changes.items():
        config = replace_field(config, key, value, Config)
    if isinstance(config, Config):
        check(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    write_json(path, dataclasses.asdict(config), indent=2)


def config_path(source: str | Path) -> Path:
    """Return the configuration file of ``source``: a run folder, a configuration file or a card's name.

    Raises:
      ConfigError: it is none of these.
    """
    name, source = str(source), Path(source)
    if source.is_dir():
        path = source / "config.json"
        if not path.is_file():
            raise ConfigError(f"{source}: no config.json in this folder; give a folder that `querydet train` wrote")
        return path
    return source if source.exists() else find_card(name)
