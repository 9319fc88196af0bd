"""Errors that a user can cause and fix. Commands print them in one line and exit with status 2.

Every message names the file or field at fault and the remedy. A command shows a traceback for anything else, so code
below it raises one of these wherever input can be bad.
"""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 6, 6, 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """Return a value for a message: as Python writes it, on one line, and cut if it is long."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # an integer of thousands of digits
        return "an integer of thousands of digits"


class QueryDetError(ValueError):
    """Base of all errors that bad input can cause."""


class Preempted(QueryDetError):
    """SIGTERM has ended a run after saving it; nothing is wrong."""


class Interrupted(Preempted):
    """Ctrl-C has ended a run after saving it."""


class ConfigError(QueryDetError):
    """A configuration file, key or value that cannot be used."""


class DataError(QueryDetError):
    """A data folder, annotation file, image or box that cannot be used."""


class WeightsError(QueryDetError):
    """A weight file or checkpoint that cannot be read or does not fit the model."""
