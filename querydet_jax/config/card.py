"""What an experiment file says about its experiment: ``card = Card(...)`` beside ``config = Config(...)``."""

from __future__ import annotations

from dataclasses import dataclass

from querydet_jax.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Card:
    """An experiment in words. Not a part of ``Config``: a file that builds on another inherits none of it.

    Attributes:
      title: one line: detector, backbone, data, and the row of the paper it stands for.
      reproduces: the numbers to expect, and whose they are.
      command: trains it from the checkout.
      pod: how to train it on several hosts, and on how many devices at most.
      measured: what was measured here, with machine, versions and time. Empty: nothing so far.
      needs: what a measurement lacks, for example "COCO and an accelerator". Empty: it has been measured.

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
