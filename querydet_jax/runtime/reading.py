"""Read text and JSON that others wrote: whatever is wrong with a file is one line that names it."""

from __future__ import annotations

import codecs
import json
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from querydet_jax.runtime.errors import DataError, QueryDetError, shown
from querydet_jax.runtime.files import reason
from querydet_jax.runtime.stores import as_path, is_url

_DIGITS = 4000  # of an integer; Python refuses to convert longer ones


def read_text(path: str | Path, error: type[QueryDetError] = DataError) -> str:
    """Read a text file: UTF-8 with or without byte order mark, or UTF-16 with one.

    Args:
      error: what to raise.

    Raises:
      QueryDetError: the file is missing, not a regular file, not readable, or not such text.
    """
    path = as_path(path)
    try:
        if not is_url(path) and not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO would wait for ever
            raise error(f"{path}: not readable (not a regular file); give a text file")
        data = path.read_bytes()
    except (OSError, ValueError) as failure:  # ValueError: a path that the system cannot express
        if type(failure) is error:
            raise
        raise error(f"{path}: not readable ({reason(failure)}); check the file and its permissions") from None
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:  # UTF-16 without its mark, or no text at all
            raise UnicodeDecodeError("utf-8", data, data.find(b"\0"), 0, "a NUL character")
    except UnicodeDecodeError as failure:
        kind = "UTF-8 or UTF-16" if marked else "UTF-8"
        raise error(
            f"{path}: not text in {kind} ({failure.reason} at byte {failure.start}); restore the file, or save it as "
            "UTF-8"
        ) from None
    return text


def read_json(path: str | Path, error: type[QueryDetError] = DataError) -> Any:
    """Read a JSON file; see ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path, error), str(path), error)


def parse_json(text: str, name: str, error: type[QueryDetError] = DataError) -> Any:
    """Parse JSON. As in Python's json, NaN and Infinity are numbers; an integer too long for Python becomes infinite.

    Args:
      name: the file's name in messages.
      error: what to raise.

    Raises:
      QueryDetError: the text is not JSON, an object has a key twice, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as failure:
        problem = str(failure)
    raise error(f"{name}: not readable as JSON ({problem}); correct or restore the file") from None


def numbers(words: Iterable[str]) -> list[float]:
    """Convert words to finite numbers; return an empty list if one is not.

    Python's float also takes other scripts' digits and underscores, which no other reader of such files does.
    """
    try:
        values = [float(word) if word.isascii() and "_" not in word else math.nan for word in words]
    except ValueError:
        return []
    return values if all(map(math.isfinite, values)) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        which = f" (id {shown(made['id'])})" if "id" in made else ""
        raise ValueError(f"an object{which} has the key {shown(twice)} twice")
    return made


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _DIGITS else math.copysign(math.inf, -1 if digits[0] == "-" else 1)
