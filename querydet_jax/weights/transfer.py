"""Load weights into a model and export them, under the official PyTorch names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from querydet_jax.config.rules import backbone_flavors
from querydet_jax.runtime.errors import WeightsError
from querydet_jax.runtime.stores import as_path
from querydet_jax.weights.classes import class_names, fit_classes, in_class_layer
from querydet_jax.weights.names import (
    ModelPath,
    from_torch_layout,
    likely_field,
    naming_style,
    official_name,
    to_torch_layout,
    torch_name,
    torch_shape,
)
from querydet_jax.weights.packaged import packaged_path
from querydet_jax.weights.readers import read_tensors
from querydet_jax.weights.writers import write_tensors

_PIXELS = ("pixel_mean", "pixel_std")
_BGR_MEAN = (103.530, 116.280, 123.675)  # of ImageNet in BGR, as MSRA's weights expect; reversed it is torchvision's

_FLAVORS = {"caffe2": "msra", "torchvision": "torchvision", "timm": "torchvision", "efficientnet": "efficientnet_lite"}


@dataclass(frozen=True)
class LoadReport:
    """What ``load_weights`` did.

    Attributes:
      loaded: tensors of the model that now hold the source's values (official names).
      missing: tensors of the model that the source lacks, unchanged (official names).
      unexpected: tensors of the source that the model has no place for (the source's names).
      fresh: tensors of the class layer of which all or some rows keep their initial values (official names; those
        of which some rows are taken are among ``loaded``).
      classes: what became of the class layer, in words; "" where there is nothing to say.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    classes: str = ""

    def __str__(self) -> str:
        number = len({*self.loaded, *self.missing, *self.fresh})
        lines = [f"loaded {len(self.loaded)} of the model's {number} tensors"]
        if self.classes:
            lines.append(self.classes)
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"{title} ({len(names)}): {', '.join(names[:6])}{more}")
        return "\n".join(lines)


def load_weights(
    model: nnx.Module, source: str | Path | Mapping[str, Any], *, classes: Sequence[str] | None = None
) -> LoadReport:
    """Copy weights into a model, in place. On an error the model is as it was.

    Args:
      model: what ``build_model`` returned.
      source: a weight file or run folder (see ``read_tensors``), arrays by name, the name of packaged weights
        (``hituav``), or ``efficientnet_lite0``: the ImageNet weights of that network's package (an extra).
        Names of QueryDet and of detectron2's RetinaNet, FCOS and Faster R-CNN are understood, as are torchvision's,
        timm's and Caffe2's (MSRA) of a ResNet, torchvision's and timm's of MobileNetV2 and torchvision's of
        ShuffleNetV2, with or without ``module.`` or ``model.`` in front. Arrays are in torch layout (convolutions
        OIHW) and of any real type; they become float32.
      classes: names of the model's classes, to start a training from weights with other classes (``fit_classes``): the
        rows of classes that a run folder names alike are taken, whatever their order, and the rest of the class layer
        keeps its initial values, which the report says. None: the class layer must fit, and is taken as it is.

    Returns:
      Which tensors were loaded, which are missing and which were not expected.

    Raises:
      WeightsError: the file cannot be read; a shape does not fit; a value is not finite; no name is one of this
        model's; the backbone has another flavour or norm than the model's.
    """
    if isinstance(source, Mapping):
        where, tensors = "weights", {str(name): value for name, value in source.items()}
    else:
        where, source = str(source), packaged_path(source) or as_path(source)
        tensors = read_tensors(source)
    variables = _variables(model)
    named, unexpected = _match(tensors, variables, where)
    _check_style(model, tensors, unexpected, where)

    arrays = {official: _float32(tensors[name], name, where) for official, name in named.items()}
    fresh, said = (), ""
    if classes is not None:
        source_names = None if isinstance(source, Mapping) else class_names(source)
        fresh, said = _fit_classes(model, arrays, variables, classes, source_names, where)
    _check_shapes(arrays, variables, named, where)
    _check_pixels(model, arrays, where)
    _check_signs(arrays, named, where)
    if naming_style(tensors) == "caffe2":
        _add_statistics(arrays, variables)

    update = []
    for name, array in arrays.items():
        path, variable = variables[name]
        value = variable.get_value()
        moved = from_torch_layout(array, path, value.shape)
        update.append((path, variable.replace(jax.device_put(moved, getattr(value, "sharding", None)))))
    nnx.update(model, nnx.from_flat_state(update))
    return LoadReport(
        loaded=tuple(name for name in variables if name in arrays),
        missing=tuple(name for name in variables if name not in arrays and name not in fresh),
        unexpected=tuple(unexpected),
        fresh=fresh,
        classes=said,
    )


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return every tensor of a model as float32 in torch layout, by official name.

    Models with a query head take QueryDet's names, others and every Faster R-CNN detectron2's.
    """
    return {
        name: to_torch_layout(np.asarray(variable.get_value(), np.float32), path)
        for name, (path, variable) in _variables(model).items()
    }


def export_weights(model: nnx.Module, path: str | Path) -> None:
    """Write ``state_dict(model)`` to a ``.safetensors``, ``.npz`` or ``.pkl`` file.

    ``load_weights`` gives back every tensor bit for bit. ``.safetensors`` is for PyTorch (``safetensors.torch``),
    ``.pkl`` for detectron2's checkpointer.

    Raises:
      WeightsError: the suffix is another, or the folder is missing or cannot be written.
    """
    write_tensors(state_dict(model), path)


def _variables(model: nnx.Module) -> dict[str, tuple[ModelPath, nnx.Variable[Any]]]:
    """Return a model's variables and their paths in it, by official name."""
    flat = [(path, v) for path, v in nnx.to_flat_state(nnx.state(model)) if not isinstance(v, nnx.RngState)]
    style = _head_style([path for path, _ in flat])
    return {torch_name(path, **style): (path, variable) for path, variable in flat}


def _head_style(paths: Collection[ModelPath]) -> dict[str, bool]:
    """Return what decides the names of a detection head, as arguments of ``torch_name``."""
    return {
        "query": any(path[0] == "query_head" for path in paths),
        "normed": any(path[0] == "head" and "norm" in path for path in paths),
    }


def _match(
    tensors: dict[str, Any], variables: dict[str, tuple[ModelPath, nnx.Variable[Any]]], where: str
) -> tuple[dict[str, str], list[str]]:
    """Map the model's official names to the source's names; return the map and the source's names left over."""
    head = _head_style([path for path, _ in variables.values()])
    style = naming_style(tensors)
    named: dict[str, str] = {}
    unexpected = []
    for name in tensors:
        official = official_name(name, **head, style=style)
        if official is None:
            continue
        if official not in variables:
            unexpected.append(name)
        elif official in named:
            raise WeightsError(f"{where}: {named[official]} and {name} are both {official}; keep one of them")
        else:
            named[official] = name
    # Every detectron2 model has pixel statistics: if they are all that is shared, it is another model.
    if not named or (unexpected and not set(named) - set(_PIXELS)):
        seen = f" (it has {unexpected[0]})" if unexpected else ""
        raise WeightsError(
            f"{where}: no tensor of this model{seen}; give weights of a QueryDet, RetinaNet, FCOS, Faster R-CNN or "
            "a backbone"
        )
    return named, unexpected


def _float32(value: Any, name: str, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        raise WeightsError(f"{where}: tensor {name} is not an array; convert it to NumPy") from None
    # Kind V: ml_dtypes' bfloat16 and 8-bit floats, which convert; plain void does not.
    if array.dtype.kind not in "fiuV" or array.dtype.names is not None or array.dtype.type is np.void:
        raise WeightsError(f"{where}: tensor {name} has type {array.dtype}; convert it to float32")
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise WeightsError(f"{where}: tensor {name} holds NaN or infinity; give weights of a run that did not diverge")
    return array


def _fit_classes(
    model: nnx.Module,
    arrays: dict[str, np.ndarray],
    variables: dict[str, tuple[ModelPath, nnx.Variable[Any]]],
    classes: Sequence[str],
    source_names: Sequence[str] | None,
    where: str,
) -> tuple[tuple[str, ...], str]:
    config = model.config  # pyright: ignore[reportAttributeAccessIssue]
    initial = {
        name: to_torch_layout(np.asarray(variable.get_value(), np.float32), path)
        for name, (path, variable) in variables.items()
        if in_class_layer(name)
    }
    anchors = 1 if config.detector == "fcos" else config.anchors.per_cell
    return fit_classes(arrays, initial, anchors=anchors, names=classes, source_names=source_names, where=where)


def _check_shapes(
    arrays: dict[str, np.ndarray],
    variables: dict[str, tuple[ModelPath, nnx.Variable[Any]]],
    named: dict[str, str],
    where: str,
) -> None:
    wrong = []
    for official, array in arrays.items():
        path, variable = variables[official]
        shape = torch_shape(variable.get_value().shape, path)
        if array.shape != shape and not (official in _PIXELS and array.shape == (3,)):
            wrong.append((official, array.shape, shape))
    if wrong:
        # Name the convolution: its bias, norm and successors fail for the same reason.
        official, given, wanted = max(wrong, key=lambda entry: len(entry[1]))
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        raise WeightsError(
            f"{where}: {named[official]} has shape {list(given)}, the model wants {list(wanted)}{more}; "
            f"set {likely_field(official, given, wanted)} to what the weights were trained with"
        )


def _check_style(model: nnx.Module, tensors: dict[str, Any], unexpected: list[str], where: str) -> None:
    """Raise WeightsError if the source's names show another flavour than the model's, or batch norm it lacks."""
    backbone = model.config.backbone  # pyright: ignore[reportAttributeAccessIssue]
    style = naming_style(tensors)
    flavor = _FLAVORS.get(style, backbone.flavor)
    if backbone.flavor != flavor:
        remedy = f"set model.backbone.flavor to {flavor}"
        if flavor not in backbone_flavors(backbone.name):
            remedy = f"{backbone.name} takes weights of the {backbone.flavor} flavour only"
        raise WeightsError(
            f"{where}: {style} names, weights of the {flavor} flavour (its stride and its colours); {remedy}"
        )
    batch_norm = [name for name in unexpected if name.endswith((".running_mean", "_bn_rm", "_bn_running_mean"))]
    if backbone.norm == "group" and batch_norm:
        raise WeightsError(f"{where}: has batch norm ({batch_norm[0]}); set model.backbone.norm to frozen or batch")


def _check_pixels(model: nnx.Module, arrays: dict[str, np.ndarray], where: str) -> None:
    """Raise WeightsError if the pixel mean is that of another flavour, which official names do not show."""
    flavor = model.config.backbone.flavor  # pyright: ignore[reportAttributeAccessIssue]
    means = {"msra": _BGR_MEAN, "torchvision": _BGR_MEAN[::-1], "efficientnet_lite": (127.0,) * 3}
    for other, mean in means.items():
        if other == flavor or "pixel_mean" not in arrays:
            continue
        if np.allclose(arrays["pixel_mean"].ravel(), mean, atol=1.0):
            raise WeightsError(
                f"{where}: pixel_mean is that of the {other} flavour, the model is {flavor}; "
                f"set model.backbone.flavor to {other}"
            )


def _check_signs(arrays: dict[str, np.ndarray], named: dict[str, str], where: str) -> None:
    """Raise WeightsError if a variance or the pixels' deviation cannot be one, which would make every output NaN."""
    for official, array in arrays.items():
        variance, deviation = official.endswith(".running_var"), official == "pixel_std"
        if (variance and (array < 0).any()) or (deviation and (array <= 0).any()):
            raise WeightsError(
                f"{where}: {named[official]} holds {array.min():g}, which is no variance or deviation; give weights "
                "that are not damaged"
            )


def _add_statistics(arrays: dict[str, np.ndarray], variables: dict[str, tuple[ModelPath, nnx.Variable[Any]]]) -> None:
    """Add mean 0 and variance 1 to norms of old Caffe2 files, which fold them into scale and bias."""
    for name in list(arrays):
        stem, found, _ = name.rpartition(".norm.weight")
        for leaf, value in (("running_mean", 0.0), ("running_var", 1.0)) if found else ():
            missing = f"{stem}.norm.{leaf}"
            if missing in variables and missing not in arrays:
                arrays[missing] = np.full(arrays[name].shape, value, np.float32)
