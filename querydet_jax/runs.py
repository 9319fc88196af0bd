"""A run's folder: its configuration and its trained model."""

from __future__ import annotations

from pathlib import Path

from querydet_jax.config import Config
from querydet_jax.data.dataset import Dataset
from querydet_jax.errors import ConfigError, DataError
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.weights import load_weights


def config_path(source: str | Path) -> Path:
    """The configuration of ``source``: a run folder's ``config.json``, or the experiment file itself."""
    source = Path(source)
    if source.is_dir():
        path = source / "config.json"
        if not path.is_file():
            raise ConfigError(f"{source}: no config.json in this folder; give a folder that train.py has written")
        return path
    if not source.exists():
        raise ConfigError(f"{source}: neither a run folder nor a configuration file; see configs/ for those provided")
    return source


def open_model(config: Config, source: str | Path, weights: str | Path | None = None) -> DenseDetector:
    """The model of ``config`` with the weights of the run folder ``source``, or with ``weights``.

    Raises:
      ConfigError: neither, or weights that lack a part of the model.
      WeightsError: the weights do not belong to this model.
    """
    if weights is None:
        if not Path(source).is_dir():
            raise ConfigError(f"{source}: a configuration holds no weights; add --weights, or give a run folder")
        weights = source
    model = build_model(config.model)
    report = load_weights(model, weights)
    if report.missing:
        raise ConfigError(
            f"{weights}: lacks {len(report.missing)} of the model's tensors ({', '.join(report.missing[:3])}, ...); "
            "give weights of the whole detector, trained with this configuration"
        )
    return model


def check_classes(config: Config, dataset: Dataset) -> None:
    """Raise where a data set's categories are not the model's classes."""
    if len(dataset.classes) != config.model.num_classes:
        raise DataError(
            f"the data set has {len(dataset.classes)} categories ({', '.join(dataset.classes[:8])}), "
            f"model.num_classes is {config.model.num_classes}: set it to {len(dataset.classes)}"
        )
    if config.classes and tuple(config.classes) != tuple(dataset.classes):
        raise DataError(
            f"the data set's categories ({', '.join(dataset.classes)}) are not the configuration's classes "
            f"({', '.join(config.classes)}): correct `classes`, or leave it empty to take the data set's"
        )
