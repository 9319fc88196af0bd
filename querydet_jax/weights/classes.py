"""Fit the class layer of weights to a model with other classes.

The class layer is what has a row per class in torch layout: ``cls_score`` of a dense head (anchor-major, row
``a * K + k``), and in Faster R-CNN ``cls_score`` (row k, the background last) and ``bbox_pred`` (rows ``4 k`` to
``4 k + 3``) of the second stage. Shape letters: A anchors per cell, K classes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from querydet_jax.runtime.errors import WeightsError

_DENSE = re.compile(r"^(det_head|head)\.cls_score\.")
_SCORES, _BOXES = "roi_heads.box_predictor.cls_score.", "roi_heads.box_predictor.bbox_pred."


def class_names(source: Path) -> tuple[str, ...] | None:
    """Return the class names in the ``config.json`` of a run folder, or of the run that a checkpoint lies in.

    Returns:
      None if there is no such file, or it names none.

    Raises:
      WeightsError: the file is damaged.
    """
    for folder in (source, *source.resolve().parents[:2]):
        file = folder / "config.json"
        if source.is_dir() and file.is_file():
            try:
                names = json.loads(file.read_text(encoding="utf-8"))["classes"]
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise TypeError
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                raise WeightsError(f"{file}: damaged, no list of classes in it; restore it from a copy") from None
            return tuple(names) or None
    return None


def fit_classes(
    arrays: dict[str, np.ndarray],
    initial: dict[str, np.ndarray],
    *,
    anchors: int,
    names: Sequence[str],
    source_names: Sequence[str] | None,
    where: str,
) -> tuple[tuple[str, ...], str]:
    """Replace the tensors of the class layer in ``arrays`` by ones that fit the model, or remove them.

    Classes are matched by name where both sides have names. Without names, a layer for as many classes is taken as it
    is, and any other starts fresh. Tensors that do not fit for another reason are left as they are.

    Args:
      arrays: tensors of the source by official name.
      initial: those of the model that are in the class layer, likewise in torch layout.
      anchors: A; 1 for FCOS.
      names: of the model's classes; empty: not known.
      source_names: of the source's classes; None: not known.
      where: the source, for messages.

    Returns:
      The names of the tensors of which all or some rows start fresh, and a sentence on it, "" if there is none to say.

    Raises:
      WeightsError: the source's class layer fits, but it names another number of classes.
    """
    # Accents are stored in one or two characters, and look the same.
    names = [unicodedata.normalize("NFC", name) for name in names]
    source_names = source_names and [unicodedata.normalize("NFC", name) for name in source_names]
    layer = sorted(set(arrays) & set(initial))
    counts = {_count(name, len(arrays[name]), anchors) for name in layer}
    here = {_count(name, len(initial[name]), anchors) for name in layer}
    same_inputs = all(arrays[name].shape[1:] == initial[name].shape[1:] for name in layer)
    if len(counts) != 1 or len(here) != 1 or None in counts or not same_inputs:
        return (), ""
    (given,), (wanted,) = counts, here
    assert given is not None and wanted is not None
    if source_names is not None and len(source_names) != given:
        if given != wanted:
            return (), ""  # its anchors are others
        raise WeightsError(f"{where}: has {given} classes, its config.json {len(source_names)}; restore that file")
    if source_names is None or not names:
        if given == wanted:
            return (), f"its {given} classes are taken in their order, because they have no names" if names else ""
        shared: dict[int, int] = {}
    elif names == source_names:
        return (), ""
    else:
        shared = {k: source_names.index(name) for k, name in enumerate(names) if name in source_names}

    for name in layer:
        if not shared:
            del arrays[name]
            continue
        fitted = initial[name].copy()
        for k, j in shared.items():
            fitted[_rows(name, k, wanted, anchors)] = arrays[name][_rows(name, j, given, anchors)]
        if name.startswith(_SCORES):
            fitted[wanted] = arrays[name][given]  # the background
        arrays[name] = fitted
    fresh = [name for k, name in enumerate(names) if k not in shared]
    numbers = f"{given} classes in the weights, {wanted} in the model"
    if not shared:
        return tuple(layer), f"the class layer starts fresh ({', '.join(layer)}): {numbers}, none known to be the same"
    taken = _some([names[k] for k in shared])
    said = f"the class layer ({', '.join(layer)}) is taken by name: {numbers}, taken: {taken}"
    if fresh:
        return tuple(layer), f"{said}; these start fresh: {_some(fresh)}"
    return (), said


def in_class_layer(name: str) -> bool:
    """Return whether a tensor of this official name has a row per class."""
    return bool(_DENSE.match(name)) or name.startswith((_SCORES, _BOXES))


def _count(name: str, rows: int, anchors: int) -> int | None:
    """Return the number of classes that a tensor of the class layer has, None if its rows fit no number."""
    if name.startswith(_SCORES):
        return rows - 1 if rows > 1 else None
    each = 4 if name.startswith(_BOXES) else anchors
    return rows // each if rows and rows % each == 0 else None


def _rows(name: str, k: int, number: int, anchors: int) -> list[int]:
    """Return the rows of class ``k`` of ``number``."""
    if name.startswith(_SCORES):
        return [k]
    return list(range(4 * k, 4 * k + 4)) if name.startswith(_BOXES) else [a * number + k for a in range(anchors)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
