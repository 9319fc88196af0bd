"""List folders of pictures and labels, and open pictures: one way for every reader."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO, NamedTuple

from PIL import Image

from querydet_jax.data.classes import plain
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.stores import files_below, is_url

_log = logging.getLogger("querydet_jax")

Image.init()  # registers the formats that Pillow decodes here
# The formats that are read. Pillow's others need programs (EPS runs Ghostscript), hold no photographs, or are rare.
FORMATS = tuple(
    kind for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF") if kind in Image.OPEN
)
SUFFIXES = frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in (*FORMATS, "MPO"))

_REASONS = 6  # named in one line


class _Listing(NamedTuple):
    """Names to take, how many others there are for each reason, and the first broken link."""

    found: list[str]
    passed: Counter[str]
    broken: str


def list_files(folder: Path, suffixes: Collection[str], *, deep: bool = True) -> list[str]:
    """List the files below ``folder`` with one of ``suffixes`` (in any case), relative to it, sorted by name.

    Links are followed; a folder that is reached twice is listed once, under its own name rather than a link's. Names
    that begin with a dot and ``__MACOSX`` are passed over, because systems and archives add them, and so are broken
    links. One line of the log counts what was passed over, by reason.

    Args:
      deep: whether to list the files in subfolders.

    Raises:
      DataError: a folder cannot be read.
    """
    list_inside = _list_objects if is_url(folder) else _walk
    found, passed, broken = list_inside(folder, suffixes, deep)
    if passed:
        reasons = [f"{count:,} {reason}" for reason, count in passed.most_common(_REASONS)]
        if len(passed) > _REASONS:
            reasons.append(f"{sum(passed.values()) - sum(n for _, n in passed.most_common(_REASONS)):,} others")
        named = f" (first broken link: {broken})" if broken else ""
        _log.info("%s: passed over %s; took %s%s", folder, ", ".join(reasons), f"{len(found):,}", named)
    return sorted(found)


def _walk(folder: Path, suffixes: Collection[str], deep: bool) -> _Listing:
    found: list[str] = []
    passed: Counter[str] = Counter()
    broken = ""
    seen: set[tuple[int, int]] = set()
    folders, links = [PurePath()], deque[PurePath]()
    while folders or links:
        inside = folders.pop() if folders else links.popleft()
        try:
            about = os.stat(folder / inside)
            if (about.st_dev, about.st_ino) in seen:  # also ends a loop of links
                passed["folder linked twice"] += 1
                continue
            seen.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{folder / inside}: not readable ({error.strerror}); check the folder and its permissions"
            ) from None
        for entry in entries:
            name, suffix = inside / entry.name, PurePath(entry.name).suffix.lower()
            # entry.is_dir would raise for a link to itself; for other entries it asks nothing of the file system.
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if _is_hidden(entry.name):
                passed["hidden"] += 1
            elif is_folder and not deep:
                passed["subfolder"] += 1
            elif is_folder:
                (links if entry.is_symlink() else folders).append(name)
            elif suffix not in suffixes:
                passed[_of_suffix(suffix)] += 1
            elif entry.is_symlink() and not os.path.exists(entry.path):
                passed["broken link"] += 1
                broken = broken or name.as_posix()
            else:
                found.append(name.as_posix())
    return _Listing(found, passed, broken)


def _list_objects(folder: Path, suffixes: Collection[str], deep: bool) -> _Listing:
    found: list[str] = []
    passed: Counter[str] = Counter()
    for name in files_below(folder):
        *folders, own = PurePath(name).parts
        suffix = PurePath(name).suffix.lower()
        if any(map(_is_hidden, (*folders, own))):
            passed["hidden"] += 1
        elif folders and not deep:
            passed["in subfolders"] += 1
        elif suffix not in suffixes:
            passed[_of_suffix(suffix)] += 1
        else:
            found.append(name)
    return _Listing(found, passed, "")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _of_suffix(suffix: str) -> str:
    return (suffix if suffix.isprintable() else "") or "without suffix"


def by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, str]:
    """List files as ``list_files``, as {name without suffix, as ``plain``: name}.

    Raises:
      DataError: two files differ only in their suffix, or in how an accent is stored; a folder cannot be read.
    """
    found: dict[str, str] = {}
    for name in list_files(folder, suffixes):
        stem = plain(PurePath(name).with_suffix("").as_posix())
        if stem in found:
            raise DataError(f"{folder}: {found[stem]} and {name} differ only in their suffix; rename or remove one")
        found[stem] = name
    return found


def near(name: str, names: Iterable[str]) -> str:
    """Return a hint for a message if one of ``names`` is ``name`` but for upper and lower case, otherwise ""."""
    same = next((other for other in names if other.casefold() == name.casefold()), None)
    return f" (there is {same})" if same else ""


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file to read; a pipe, socket or device, which could block or never end, is refused at once. An
    object of a store is read whole.

    Raises:
      DataError: the path is no regular file.
      OSError: it cannot be opened.
    """
    if is_url(path):
        yield io.BytesIO(path.read_bytes())
        return
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a pipe that nobody writes to
            raise _irregular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _irregular(path)
    with os.fdopen(number, "rb") as file:
        yield file


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file; raise as ``open_regular``."""
    with open_regular(path) as file:
        return file.read()


def _irregular(path: Path) -> DataError:
    return DataError(f"{path}: is a folder, pipe, socket or device, not a regular file; remove it or leave it out")
