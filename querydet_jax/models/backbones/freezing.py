"""Effect of ``BackboneConfig.freeze_at`` on the frozen parts of any backbone."""

from __future__ import annotations

from jax import Array, lax

from querydet_jax.config import BackboneConfig


def norm_kind(config: BackboneConfig, part: str, frozen: tuple[str, ...]) -> str:
    """Return the norm of a part; frozen parts replace batch norm, whose statistics would still change their outputs."""
    return "frozen" if config.norm == "batch" and part in frozen else config.norm


def stop_if_frozen(x: Array, part: str, frozen: tuple[str, ...]) -> Array:
    """Return the output of a part; frozen parts stop the gradient, so that of their parameters is zero."""
    return lax.stop_gradient(x) if part in frozen else x
