"""What ``BackboneConfig.freeze_at`` does to the frozen children of a backbone, the same for all of them."""

from __future__ import annotations

from jax import Array, lax

from querydet_jax.config import BackboneConfig


def norm_kind(config: BackboneConfig, part: str, frozen: tuple[str, ...]) -> str:
    """The norm of a child: live statistics would go on changing what a frozen one computes."""
    return "frozen" if config.norm == "batch" and part in frozen else config.norm


def stop_if_frozen(x: Array, part: str, frozen: tuple[str, ...]) -> Array:
    """Output of a child: whoever differentiates with respect to every parameter finds a frozen one's at zero."""
    return lax.stop_gradient(x) if part in frozen else x
