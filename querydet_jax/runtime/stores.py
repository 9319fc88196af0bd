"""Paths on this machine or in an object store: ``gs://BUCKET/NAME``, ``s3://BUCKET/NAME``.

The only file that knows the difference. ``as_path`` returns a ``Path`` for a local path and, for a URL, what does as a
``Path`` does and is none: the system's own functions refuse it, so no folder named ``s3:`` can appear. Reading asks
again, after a pause, what a network may answer better the next time. An object is written as a whole or not at all
(``files.written_aside``). universal_pathlib, fsspec, gcsfs and s3fs do the work; credentials, endpoints and proxies are
found as their own tools find them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import logging
import os
import posixpath
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from querydet_jax.runtime.errors import ConfigError, QueryDetError

if TYPE_CHECKING:
    from querydet_jax.runtime.cache import Cache

_log = logging.getLogger("querydet_jax")

# The driver of each scheme, and the requirements that install it.
_DRIVERS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Seconds, each with up to as much again, before a request is repeated; the drivers have then repeated it themselves.
_PAUSES, _PAUSES_OF_UPLOADS = (1.0, 3.0), (1.0, 3.0, 10.0, 30.0)
_TRANSFERS = 8  # files at once
_REMEDIES = {
    errno.ENOENT: "correct the address, or create it",
    errno.EACCES: "check the store's credentials on this machine, and what they may do there",
    errno.EIO: "check the network and the endpoint, then start again",
}

Value = TypeVar("Value")


class StoreError(OSError, QueryDetError):
    """An object store that does not answer, or refuses. Its OSError part names errno, reason and URL."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}; {_REMEDIES[self.errno or errno.EIO]}"


class NoSuchObject(StoreError, FileNotFoundError):
    """A store has no such bucket, folder or object."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path, given or of ``as_path``, is in an object store."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in _DRIVERS))


def as_path(given: str | os.PathLike[str]) -> Path:
    """Return what a user gave as a path; a ``Path`` is returned as it is.

    Raises:
      ConfigError: a URL of another kind, or one that a ``Path`` has swallowed a slash of; its driver is not installed.
    """
    if isinstance(given, Path) or not isinstance(given, str):
        text = str(given)
        if swallowed := re.match(rf"({'|'.join(_DRIVERS)}):/(?!/)", text):
            raise ConfigError(f"{text}: a pathlib.Path loses a slash of a URL: give the string {swallowed[1]}://...")
        return given if isinstance(given, Path) or is_url(text) else Path(given)  # pyright: ignore[reportReturnType]
    scheme, separator, rest = given.partition("://")
    if not separator or "/" in scheme:
        if re.match(rf"({'|'.join(_DRIVERS)}):", given):
            raise ConfigError(f"{given}: an address in a store begins with {given.partition(':')[0]}://")
        return Path(given)
    if scheme not in _DRIVERS:
        raise ConfigError(f"{given}: {scheme}:// is not read; give gs://, s3:// or a path on this machine")
    if not rest.strip("/"):
        raise ConfigError(f"{given}: names no bucket; give {scheme}://BUCKET/NAME")
    _check_driver(scheme)
    return cast(Path, StorePath(scheme, PurePosixPath(rest)))


def is_folder(path: Path) -> bool:
    """Return ``path.is_dir()``, but False of a local name that is too long, which pathlib raises for."""
    return path.is_dir() if is_url(path) else os.path.isdir(path)


def is_file(path: Path) -> bool:
    """Return ``path.is_file()``, but False of a local name that is too long."""
    return path.is_file() if is_url(path) else os.path.isfile(path)


def is_there(path: Path) -> bool:
    """Return ``path.exists()``, but False of a local name that is too long."""
    return path.exists() if is_url(path) else os.path.exists(path)


def local_path(given: str | os.PathLike[str]) -> Path:
    """Return what a user gave as a path on this machine.

    Raises:
      ConfigError: it is a URL.
    """
    path = as_path(given)
    if is_url(path):
        raise ConfigError(f"{path}: must be on this machine; copy what is there, and give its path here")
    return path


def same_parts(path: Path, parts: Sequence[str]) -> Path:
    """Return the path, where ``path`` is, that has these ``parts`` in place of its own."""
    return cast(Path, path.at(PurePosixPath(*parts))) if isinstance(path, StorePath) else Path(*parts)


def through(path: Path, cache: Cache) -> Path:
    """Return a URL as a path whose objects, and those of every path made from it, are read through a cache."""
    return cast(Path, StorePath(_of(path).scheme, _of(path).key, cache))


def with_file(path: Path, do: Callable[[Path], Value]) -> Value:
    """Return ``do(file)`` of what reads files alone, where ``file`` is the path itself or its copy in the cache.

    Raises:
      ConfigError: a URL that is not read through a cache.
      QueryDetError: see ``Cache.use``.
    """
    if not is_url(path):
        return do(path)
    check_cache(path, 0)
    return cast("Cache", _of(path).cache).use(_of(path), do)


def check_cache(path: Path, size: int) -> None:
    """Raise ConfigError unless files of ``size`` bytes, which are read at random, fit in a URL's cache."""
    if not is_url(path):
        return
    cache = _of(path).cache
    if cache is None:
        raise ConfigError(
            f"{path}: is read from a store through copies on this machine alone; set data.cache to a folder with "
            f"{size / 1e9:.1f} GB of room, and data.cache_gb if there must be a limit"
        )
    if 0 < cache.limit < size:
        raise ConfigError(
            f"data.cache_gb {cache.limit / 1e9:g}: {path} is read at random and takes {size / 1e9:.3g} GB; give at "
            "least as much"
        )


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a path of the same name on this machine for what reads files alone: the path itself, or a copy that lasts
    as long as the block, of a file or of a whole folder.

    Raises:
      StoreError: the store does not answer, refuses or has no such object.
    """
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="querydet-") as folder:
        copy = Path(folder) / (path.name or "bucket")
        download(path, copy)
        yield copy


def download(path: Path, to: Path, chosen: Callable[[str], bool] = bool) -> None:
    """Copy a file, or a folder's files, from a store to this machine, where it replaces what has this name.

    Args:
      chosen: of a folder, whether to copy the file of this name relative to it.

    Raises:
      StoreError: the store does not answer, refuses or has no such object.
    """
    if path.is_dir():
        names = list(filter(chosen, files_below(path)))
        _each(lambda name: _fetch(path / name, to / name), names)
        to.mkdir(parents=True, exist_ok=True)
    else:
        _fetch(path, to)


def local_copies(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return where files are on this machine: where they are, or, of those in a store, copied to ``folder`` under their
    numbers, several at once. Of an object that is not there, there is no copy.

    Raises:
      StoreError: the store does not answer, or refuses.
    """
    places = [folder / f"{n:05}{file.suffix}" if is_url(file) else file for n, file in enumerate(files)]

    def fetch(n: int) -> None:
        with contextlib.suppress(NoSuchObject):
            _fetch(files[n], places[n])

    _each(fetch, [n for n, file in enumerate(files) if is_url(file)])
    return places


def upload(local: Path, to: Path) -> None:
    """Copy a file, or a folder's files, from this machine to a store. Each appears there whole or not at all.

    Raises:
      StoreError: the store does not answer or refuses.
    """
    if local.is_dir():
        inside = sorted(path for path in local.rglob("*") if path.is_file())
        _each(lambda path: upload(path, to / path.relative_to(local).as_posix()), inside)
    else:
        with local.open("rb"):  # what is wrong here is none of the store's faults
            _of(to).ask("put_file", path=str(local), rpath=str(_of(to).key))


def files_below(folder: Path) -> list[str]:
    """List the files in a folder of a store and below it by their names relative to it, sorted."""
    return sorted(sizes_below(folder))


def sizes_below(folder: Path) -> dict[str, int]:
    """Return the bytes of the files in a folder of a store and below it, by their names relative to it."""
    found: dict[str, dict[str, Any]] = _of(folder).ask("find", detail=True)
    above = f"{_of(folder).key}/"
    return {
        name.lstrip("/").removeprefix(above): about["size"] for name, about in found.items() if not name.endswith("/")
    }


def sizes_of(folder: Path, names: Sequence[str]) -> list[int]:
    """Return the bytes of files in a folder.

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not is_url(folder):
        return [(folder / name).stat().st_size for name in names]
    found = sizes_below(folder)
    for name in names:
        if name not in found:
            raise NoSuchObject(errno.ENOENT, "there is no such object or folder", str(folder / name))
    return [found[name] for name in names]


def matching(pattern: str) -> list[Path]:
    """Return what a URL with ``*``, ``?``, ``[...]`` or ``**`` in its last parts matches."""
    folder = as_path(re.split(r"[^/]*[*?\[]", pattern)[0])
    return list(folder.glob(str(pattern).removeprefix(f"{folder}/")))


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder and below it."""
    if isinstance(path, StorePath):
        return path.size() if path.is_file() else sum((path / name).size() for name in files_below(path))
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def remove(path: Path) -> None:
    """Delete a file of a store, or a folder with all below it; nothing if there is none."""
    with contextlib.suppress(NoSuchObject):
        _of(path).ask("rm", recursive=True)


def _of(path: Path) -> StorePath:
    assert isinstance(path, StorePath), f"{path} is no URL"
    return path


def _fetch(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if (cache := _of(path).cache) is not None:
        cache.use(_of(path), lambda copy: shutil.copyfile(copy, to))
    else:
        _of(path).ask("get_file", str(to))


def _each(do: Callable[[Value], None], values: list[Value]) -> None:
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        for _ in pool.map(do, values):
            pass


class StorePath:
    """An object, or all whose names begin with this one's and a slash: a folder. Has what is used of ``Path``.

    It has no ``__fspath__``, so that what is for files alone refuses it instead of making local ones. With a ``cache``
    objects are read through it.
    """

    def __init__(self, scheme: str, key: PurePosixPath, cache: Cache | None = None):
        self.scheme, self.key, self.cache = scheme, key, cache  # the key begins with the bucket

    def at(self, key: PurePosixPath) -> StorePath:
        return StorePath(self.scheme, key, self.cache)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __lt__(self, other: StorePath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str | os.PathLike[str]) -> StorePath:
        return self.at(self.key / PurePosixPath(str(name).lstrip("/")))

    def __getattr__(self, name: str) -> Any:
        if name not in ("name", "stem", "suffix", "suffixes", "parts"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.key, name)

    def joinpath(self, *names: str | os.PathLike[str]) -> StorePath:
        return functools.reduce(StorePath.__truediv__, names, self)

    @property
    def parent(self) -> StorePath:
        return self.at(self.key.parent) if len(self.key.parts) > 1 else self

    @property
    def parents(self) -> list[StorePath]:
        return [self.at(key) for key in self.key.parents if key.parts]

    def with_name(self, name: str) -> StorePath:
        return self.at(self.key.with_name(name))

    def with_stem(self, stem: str) -> StorePath:
        return self.at(self.key.with_stem(stem))

    def with_suffix(self, suffix: str) -> StorePath:
        return self.at(self.key.with_suffix(suffix))

    def is_relative_to(self, other: object) -> bool:
        return isinstance(other, StorePath) and other.scheme == self.scheme and self.key.is_relative_to(other.key)

    def relative_to(self, other: StorePath) -> PurePosixPath:
        return self.key.relative_to(other.key)

    def resolve(self) -> StorePath:
        return self.at(PurePosixPath(posixpath.normpath(self.key)))

    def exists(self) -> bool:
        return self._kind() != ""

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[StorePath]:
        for name in self.ask("ls", detail=False):
            if name.strip("/") != str(self.key):  # an empty object that some tools make in place of a folder
                yield self / PurePosixPath(name).name

    def glob(self, pattern: str) -> Iterator[StorePath]:
        for name in self.ask("glob", path=f"{self.key}/{pattern}"):
            yield self.at(PurePosixPath(name.strip("/")))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Create nothing: a folder of a store is its objects. But its bucket must be there."""
        self._check_bucket()

    def open(self, mode: str = "r", encoding: str | None = None, errors: str | None = None) -> IO[Any]:
        if mode not in ("r", "rb"):
            raise io.UnsupportedOperation(f"{self}: an object is written as a whole, by files.written_aside")
        data = io.BytesIO(self.read_bytes())
        return data if mode == "rb" else io.TextIOWrapper(data, encoding or "utf-8", errors)

    def read_bytes(self) -> bytes:
        return self.ask("cat_file") if self.cache is None else self.cache.use(self, Path.read_bytes)

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def size(self) -> int:
        return self.ask("info")["size"]

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.ask("rm_file")
        except NoSuchObject:
            if not missing_ok:
                raise

    def ask(self, method: str, *arguments: Any, path: str = "", **options: Any) -> Any:
        """Call a method of fsspec's file system with this path; repeat it after a pause while the store is silent.

        Raises:
          StoreError: the store does not answer, refuses or has no such object.
        """
        call = getattr(_file_system(self.scheme), method)
        for pause in (*(_PAUSES_OF_UPLOADS if method == "put_file" else _PAUSES), None):
            try:
                return call(path or str(self.key), *arguments, **options)
            except Exception as error:  # of fsspec, the driver, its HTTP client or the system
                told = _told(error, str(self))
                if isinstance(told, NoSuchObject) and len(self.key.parts) > 1:
                    self._check_bucket()
                if pause is None or told.errno != errno.EIO:
                    raise told from error
                _log.info("%s: %s; asked again", self, told.strerror)
                time.sleep(pause * (1 + random.random()))
        raise AssertionError("the last request returns or raises")

    def _kind(self) -> str:
        """Return "file", "directory" or "" for neither. fsspec's own questions take a refusal for a no."""
        try:
            return self.ask("info")["type"]
        except NoSuchObject:
            self._check_bucket()
            return ""

    def _check_bucket(self) -> None:
        _check_bucket(StorePath(self.scheme, PurePosixPath(self.key.parts[0])))


@functools.cache  # once; if it fails, again
def _check_bucket(bucket: StorePath) -> None:
    """Raise StoreError if there is no such bucket. One that may not be listed may hold objects that may be read."""
    try:
        bucket.ask("info")
    except NoSuchObject:
        raise NoSuchObject(errno.ENOENT, "there is no such bucket", str(bucket)) from None
    except StoreError as error:
        if error.errno != errno.EACCES:
            raise


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec  # pyright: ignore[reportMissingImports]

    return fsspec.filesystem(scheme, use_listings_cache=False)  # others write to the folder, too


def _check_driver(scheme: str) -> None:
    driver, extra = _DRIVERS[scheme]
    try:
        importlib.import_module(driver)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}://: cannot be read here ({error}); pip install -r requirements-{extra}.txt"
        ) from None


def _told(error: Exception, url: str) -> StoreError:
    """Return what a driver raised as one that names the URL and a reason in a line."""
    cause = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    # gcsfs raises HttpError with a code, s3fs errors of the system that it made of codes.
    code = getattr(error, "code", None)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, FileNotFoundError) or code in (404, "404"):
        return NoSuchObject(errno.ENOENT, "there is no such object or folder", url)
    if isinstance(error, PermissionError) or code in (401, 403, "401", "403") or cause.startswith("Forbidden"):
        return StoreError(errno.EACCES, f"the store refuses ({cause})", url)
    if any("Credential" in kind for kind in kinds):
        return StoreError(errno.EACCES, f"the store gets no credentials ({cause})", url)
    return StoreError(errno.EIO, f"the store does not answer ({cause})", url)
