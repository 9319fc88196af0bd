"""Get ONNX Runtime for browsers: three files of the npm package onnxruntime-web, in one pinned version."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import logging
import os
import tarfile
import urllib.request
from pathlib import Path

from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import written_aside
from querydet_jax.runtime.machine import cache_folder
from querydet_jax.runtime.reading import read_json
from querydet_jax.runtime.stores import local_path

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of the package, as the registry states it."""
URL = f"https://registry.npmjs.org/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
WASM = "ort-wasm-simd-threaded.wasm"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", WASM)
"""For the CPU alone; the package has more for other devices."""

_SECONDS = 60  # without an answer
_FETCH = f"npm pack {PACKAGE}@{VERSION}"
_ELSEWHERE = f"fetch it where there is a network ({_FETCH}), and name the file: --runtime {PACKAGE}-{VERSION}.tgz"
_log = logging.getLogger("querydet_jax")


def web_runtime(source: str | Path = "") -> dict[str, bytes]:
    """Return the contents of ``FILES``.

    Args:
      source: the package as npm's file (``.tgz``), or a folder in which it is unpacked, such as
        ``node_modules/onnxruntime-web``. Empty: fetched from the registry once, then kept in ``~/.cache/querydet_jax``.

    Raises:
      DataError: the package is of another version or damaged, or cannot be read or fetched.
    """
    if not source:
        return _unpacked(_fetched())
    path = local_path(source)
    try:
        if path.is_dir():
            return _of_folder(path)
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"--runtime {error.filename or path}: cannot be read ({error.strerror}); give npm's file of {PACKAGE} "
            f"{VERSION}, or its unpacked folder"
        ) from None
    if not _is_intact(data):
        raise DataError(f"--runtime {path}: is not {PACKAGE} {VERSION} as published; fetch it: {_FETCH}")
    return _unpacked(data)


def _fetched() -> bytes:
    kept = None
    try:
        kept = cache_folder(os.environ) / URL.rpartition("/")[2]
        data = kept.read_bytes()
        if _is_intact(data):
            return data
    except (OSError, RuntimeError):  # none yet, or no home folder
        _log.info("fetching %s, 33 MB, once", URL)
    try:
        with urllib.request.urlopen(URL, timeout=_SECONDS) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{URL}: cannot be fetched ({getattr(error, 'reason', error)}); {_ELSEWHERE}") from None
    if not _is_intact(data):
        raise DataError(f"{URL}: came damaged ({len(data):,} bytes, of another SHA-512); try again, or {_ELSEWHERE}")
    try:
        if kept is not None:
            with written_aside(kept) as aside:
                aside.write_bytes(data)
    except OSError as error:
        _log.info("%s is not kept for later exports: %s", PACKAGE, error)
    return data


def _is_intact(data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == INTEGRITY


def _unpacked(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {name: archive.extractfile(f"package/dist/{name}") for name in FILES}
        return {name: member.read() for name, member in members.items() if member is not None}


def _of_folder(folder: Path) -> dict[str, bytes]:
    about = read_json(folder / "package.json", DataError)
    found = tuple(about.get(key) for key in ("name", "version")) if isinstance(about, dict) else None
    if found != (PACKAGE, VERSION):
        raise DataError(f"--runtime {folder}: package.json is not of {PACKAGE} {VERSION}; fetch it: {_FETCH}")
    return {name: (folder / "dist" / name).read_bytes() for name in FILES}
