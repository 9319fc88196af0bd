"""The description of an experiment: ``card = Card(...)`` beside ``config = Config(...)`` in its file."""

from __future__ import annotations

from dataclasses import dataclass

from querydet_jax.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Card:
    """An experiment in words. It is not part of ``Config``, so a file that builds on another does not inherit it.

    Attributes:
      title: one line: detector, backbone, data, and the row of the paper that it reproduces.
      reproduces: the expected numbers and their source.
      command: the command that trains it from the checkout.
      pod: how to train it on several hosts, and the largest number of devices.
      measured: figures measured here, with machine, versions and time; empty if there are none yet.
      needs: what a measurement still requires, for example "COCO and an accelerator"; empty if measured.

    Raises:
      ConfigError: both or neither of ``measured`` and ``needs`` are given.
    """

    title: str
    reproduces: str
    command: str
    pod: str
    measured: str = ""
    needs: str = ""

    def __post_init__(self) -> None:
        if bool(self.measured) == bool(self.needs):
            raise ConfigError(f"card {self.title!r}: give measured (figures) or needs (what is missing), not both")
