"""Names of files: to show on a terminal, and for what is written about them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import PurePath

_LONGEST = 120  # bytes of a stem: file systems take 255, of which suffixes and temporary names need some


def printable(text: str) -> str:
    """Escape what a terminal would obey or cannot show: control and formatting characters, lone surrogates.

    Line breaks and tabs stay.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else ascii(c)[1:-1] for c in text
    )


def one_line(text: str) -> str:
    """Return ``printable`` text without line breaks."""
    return printable(text).replace("\n", "\\n")


def result_stems(paths: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Return a file stem for the results about each path, different for different paths.

    It is the path's own stem where no other path has it; otherwise folders are put in front
    (``cam1/0001.png`` and ``cam2/0001.png`` become ``cam1_0001`` and ``cam2_0001``), then the suffix is added
    (``a.png`` and ``a.jpg`` in one folder become ``a_png`` and ``a_jpg``), then a number. Characters that a file name
    cannot hold everywhere become ``_``; a long stem ends in a hash.

    Args:
      paths: names of files, with or without folders.
      taken: stems not to return.
    """
    parts = [PurePath(path).with_suffix("").parts for path in paths]
    stems = [_safe(own[-1]) if own else "_" for own in parts]
    for deeper in range(2, max(map(len, parts), default=0) + 1):
        for i in _clashing(stems):
            stems[i] = _safe("_".join(parts[i][-deeper:]))
    for i in _clashing(stems):
        stems[i] = _safe(stems[i] + PurePath(paths[i]).suffix.replace(".", "_"))
    used = {stem.casefold() for stem in taken}
    for i, stem in enumerate(stems):
        number = 1
        while stems[i].casefold() in used:
            number += 1
            stems[i] = f"{stem}_{number}"
        used.add(stems[i].casefold())
    return stems


def _clashing(stems: Sequence[str]) -> list[int]:
    """Return the positions of stems that another has, too; some file systems ignore case."""
    first: dict[str, int] = {}
    clashing: set[int] = set()
    for i, stem in enumerate(stems):
        other = first.setdefault(stem.casefold(), i)
        if other != i:
            clashing |= {other, i}
    return sorted(clashing)


def _safe(stem: str) -> str:
    stem = "".join("_" if c in '/\\:*?"<>|' or unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in stem)
    encoded = stem.encode()
    if len(encoded) <= _LONGEST:
        return stem
    return encoded[: _LONGEST - 9].decode(errors="ignore") + "_" + hashlib.sha256(encoded).hexdigest()[:8]
