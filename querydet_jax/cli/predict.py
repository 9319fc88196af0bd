"""`querydet predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from querydet_jax.cli.arguments import parse, parse_alone, source_of
from querydet_jax.config import DataConfig, override
from querydet_jax.data.plan import both_orientations
from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.pictures import Pictures
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.artifact import Artifact, ArtifactError
from querydet_jax.inference.results import ImageResult, run_on_images
from querydet_jax.inference.runs import open_model
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.runtime.files import write_json
from querydet_jax.viz.draw import save_image
from querydet_jax.viz.stages import cascade_pictures

_DESCRIPTION = (
    "Detect objects in pictures and draw what was found and, for a run or a card, what was computed. "
    "An artifact is a file that `querydet export` wrote; its settings are fixed."
)


@dataclass(frozen=True)
class PredictArguments:
    images: tuple[str, ...] = ()
    """Pictures, or folders of pictures."""
    out: str = "predictions"
    """Folder for the pictures and detections.json."""
    weights: str = ""
    """Weight file or run folder, if the source is a card."""
    min_score: float = 0.3
    """Draw and list detections with at least this score."""


class _Subject(NamedTuple):
    """A detector and what is known about it."""

    detector: Detector | Artifact
    name: str
    classes: tuple[str, ...]
    resizing: DataConfig
    query: str
    threshold: float
    batch_size: int


def predict(words: Sequence[str], program: str) -> None:
    """Detect objects in pictures and draw what was found and, for a run, what was computed."""
    source = source_of(words)
    if any(word.split("=")[0] == "--artifact" for word in words):
        raise ConfigError("--artifact: name the file in place of a run: predict FILE.zip --images PICTURE_OR_FOLDER")
    if source is not None and Path(source).is_file() and Path(source).suffix == ".zip":
        arguments = parse_alone(
            PredictArguments,
            _DESCRIPTION,
            words[1:],
            f"{program} {source}",
            "fixed in an artifact; export again with it, or name a run",
        )
        machine.prepare()
        if arguments.weights:
            raise ConfigError(f"--weights {arguments.weights}: an artifact holds its own; export again with these")
        try:
            _predict(_of_artifact(Artifact(source)), arguments)
        except ArtifactError as error:
            raise QueryDetError(str(error)) from error
    else:
        arguments, config, path = parse(
            PredictArguments, _DESCRIPTION, words, program, source="CARD_OR_RUN_OR_ARTIFACT"
        )
        machine.prepare()
        model = open_model(config, path, arguments.weights or None)
        data = override(config.data, {"test_canvases": both_orientations(config.data.test_canvases)})
        classes = config.classes or tuple(f"class {k}" for k in range(config.model.num_classes))
        inference = config.inference
        detector = Detector(model, inference)
        subject = _Subject(detector, config.name, classes, data, inference.query, inference.threshold, 1)
        _predict(subject, arguments)


def _of_artifact(artifact: Artifact) -> _Subject:
    manifest = artifact.manifest
    resize, inference = manifest["preprocessing"], manifest["inference"]
    data = DataConfig(
        test_short=resize["test_short"],
        test_max=resize["test_max"],
        test_canvases=artifact.canvases,
        exif=resize.get("exif", "auto"),  # artifacts of 0.1.0 lack it and the next one
        bit_depth=resize.get("bit_depth", ""),
    )
    batch_size = min(artifact.batch_sizes or (1,))
    name, query, threshold = manifest["name"], inference["query"], inference["threshold"]
    return _Subject(artifact, name, artifact.classes, data, query, threshold, batch_size)


def _predict(subject: _Subject, arguments: PredictArguments) -> None:
    if not arguments.images:
        raise DataError("--images: name at least one picture or folder")
    pictures = Pictures(arguments.images, subject.classes, Reading.of(subject.resizing))
    out = Path(arguments.out)
    entries, used = [], set()
    for result in run_on_images(subject.detector, pictures, subject.resizing, batch_size=subject.batch_size):
        file = Path(pictures.file_name(result.index))
        stem = file.stem
        while stem in used:  # pictures of one name from different folders
            stem += "_"
        used.add(stem)
        drawn = cascade_pictures(result, subject.classes, subject.threshold, min_score=arguments.min_score)
        for title, picture in drawn.items():
            save_image(out / f"{stem}_{title}.jpg", picture)
        entries.append(_entry(file, result, subject.classes, arguments.min_score))
        count = len(entries[-1]["detections"])
        print(f"{file}: {count} objects; {', '.join(sorted(drawn))} -> {out}/{stem}_*.jpg", flush=True)
    write_json(out / "detections.json", {"images": entries, "model": subject.name, "query": subject.query}, indent=2)
    if pictures.broken:
        raise DataError(f"{len(pictures.broken)} pictures were left out: {'; '.join(pictures.broken)}")


def _entry(file: Path, result: ImageResult, names: Sequence[str], min_score: float) -> dict[str, Any]:
    """Return a picture's detections for ``detections.json``."""
    kept = result.scores >= min_score
    return {
        "file": str(file),
        "height": result.image.shape[0],
        "width": result.image.shape[1],
        "detections": [
            {
                "class": names[k],
                "class_id": int(k),
                "score": float(s),
                "box_xyxy": [round(float(v), 2) for v in b],
            }
            for b, s, k in zip(result.boxes[kept], result.scores[kept], result.classes[kept], strict=True)
        ],
    }
