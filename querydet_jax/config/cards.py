"""Find experiment cards by name: in the wheel, or in the checkout that the package lies in."""

from __future__ import annotations

import difflib
from pathlib import Path

from querydet_jax.config.zoo import zoo_names
from querydet_jax.runtime.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]


def cards_folder() -> Path:
    """Return the folder of the cards: ``querydet_jax/configs`` in a wheel, ``configs`` in a checkout.

    Raises:
      ConfigError: neither is there.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "demo.py").is_file():
            return folder
    raise ConfigError(f"{_PACKAGE}: this installation has no cards; install querydet-jax again, or work in a checkout")


def card_names() -> list[str]:
    """Return the names of all cards, sorted."""
    return sorted(path.stem for path in cards_folder().glob("*.py"))


def find_card(name: str) -> Path:
    """Return the file of the card ``name``.

    Raises:
      ConfigError: no such card; names the nearest one.
    """
    path = cards_folder() / f"{name}.py"
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, [*card_names(), *zoo_names()], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{name}: neither a card, a configuration file nor a run folder; {hint}`querydet cards` lists the cards"
    )
