"""PyAV, which reads and writes videos: an extra."""

from __future__ import annotations

import types

from querydet_jax.runtime.errors import QueryDetError


def import_av() -> types.ModuleType:
    """Return the module ``av``.

    Raises:
      QueryDetError: it is not installed, or cannot be used here.
    """
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        missing = "" if isinstance(error, ModuleNotFoundError) else f" (av: {str(error).splitlines()[0]})"
        raise QueryDetError(f"videos need an extra: pip install -r requirements-video.txt{missing}") from None
    return av
