"""`querydet cards`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from querydet_jax.cli.arguments import wants_help
from querydet_jax.config import card_names, config_path, find_card, load_card, load_config
from querydet_jax.config.zoo import is_packaged
from querydet_jax.runtime.errors import QueryDetError


def cards(words: Sequence[str], program: str) -> None:
    """List the cards, or print one: what it reproduces, its command, and its full configuration as JSON."""
    if wants_help(words) or len(words) > 1:
        print(
            f"usage: {program} [NAME]\n\nList the experiment cards, or print one: what it reproduces, how to train it, "
            "and its full configuration as JSON."
        )
        if not wants_help(words):
            sys.exit(2)
    elif words:
        path = config_path(words[0])
        if path.suffix != ".py":
            what = "packaged weights" if is_packaged(path.parent) else "a run"
            raise QueryDetError(f"{words[0]}: {what}, not a card; the configuration is {path}")
        for field, value in dataclasses.asdict(load_card(path)).items():
            if value:
                print(f"# {field}: " + value.replace("\n", "\n#   "))
        print(json.dumps(dataclasses.asdict(load_config(path)), indent=2))
    else:
        names = card_names()
        width = max(map(len, names))
        for name in names:
            print(f"{name:<{width}}  {load_card(find_card(name)).title}")
