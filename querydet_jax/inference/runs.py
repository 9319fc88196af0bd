"""A run's trained model."""

from __future__ import annotations

from pathlib import Path

from querydet_jax.config import Config
from querydet_jax.config.zoo import zoo_folder
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.stores import as_path
from querydet_jax.weights import load_weights


def open_model(config: Config, source: str | Path, weights: str | Path | None = None) -> DenseDetector:
    """Build the model of ``config`` with the weights of the run folder ``source``, or with ``weights``.

    Either may also be a folder of packaged weights, ``weights`` the name of some.

    Raises:
      ConfigError: neither, or weights that lack a part of the model.
      WeightsError: the weights do not belong to this model.
    """
    if weights is None:
        if not as_path(source).is_dir():
            raise ConfigError(f"{source}: a configuration holds no weights; add --weights, or give a run folder")
        weights = source
    else:
        weights = zoo_folder(weights) or weights
    model = build_model(config.model)
    # Another run may number the classes otherwise.
    named = config.classes if weights != source and as_path(weights).is_dir() else ()
    report = load_weights(model, weights, classes=named or None)
    if report.fresh:
        raise ConfigError(
            f"{weights}: lacks classes of this configuration: {report.classes}; give weights that have all"
        )
    if report.missing:
        raise ConfigError(
            f"{weights}: lacks {len(report.missing)} of the model's tensors ({', '.join(report.missing[:3])}, ...); "
            "give weights of the whole detector, trained with this configuration"
        )
    return model
