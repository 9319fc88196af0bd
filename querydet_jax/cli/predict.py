"""`querydet predict`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from querydet_jax.cli.arguments import parse, parse_alone, source_of
from querydet_jax.config import DataConfig, override
from querydet_jax.data.plan import both_orientations
from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.pictures import Pictures
from querydet_jax.inference.detections_file import DetectionsFile, entry
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.artifact import Artifact, ArtifactError
from querydet_jax.inference.results import run_on_images
from querydet_jax.inference.runs import open_model
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.runtime.files import beside, identity
from querydet_jax.runtime.names import one_line, result_stems
from querydet_jax.viz.draw import save_image
from querydet_jax.viz.stages import cascade_pictures

_log = logging.getLogger("querydet_jax")

_DESCRIPTION = (
    "Detect objects in pictures and draw what was found and, for a run or a card, what was computed. "
    "An artifact is a file that `querydet export` wrote; its settings are fixed."
)


@dataclass(frozen=True)
class PredictArguments:
    images: tuple[str, ...] = ()
    """Pictures, or folders of pictures."""
    out: str = "predictions"
    """Folder for detections.json and the pictures drawn; inputs in it stay as they are."""
    weights: str = ""
    """Weight file or run folder, if the source is a card."""
    min_score: float = 0.3
    """Draw and list detections with at least this score."""
    draw: Literal["none", "boxes", "queries"] = "boxes"
    """Pictures to draw: none; the boxes; queries: also, by level, where the cascade looked (a second pass)."""


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
        detector = Detector(model, inference, max_shapes=len(data.test_canvases))
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
    if "" in arguments.images:
        raise DataError("--images: one of the names is empty; give a picture or folder, . for this folder")
    if not 0 <= arguments.min_score <= 1:
        raise ConfigError(f"--min-score {arguments.min_score:g}: give a score from 0 to 1")
    if arguments.draw == "queries" and (isinstance(subject.detector, Artifact) or subject.query == "dense"):
        raise ConfigError(
            f"--draw queries: {subject.name} shows none, because "
            + ("inference.query is dense" if subject.query == "dense" else "an artifact returns no maps; name the run")
        )
    pictures = Pictures(arguments.images, subject.classes, Reading.of(subject.resizing))
    files = [pictures.file_name(i) for i in range(len(pictures))]
    stems, inputs = result_stems(files), {identity(path) for path in pictures.paths} - {None}
    out = Path(arguments.out)
    if identity(out / "detections.json") in inputs:
        raise ConfigError(f"--out {out}: its detections.json is one of the pictures; choose another folder")
    if arguments.draw != "none" and any(path.resolve().parent == out.resolve() for path in pictures.paths):
        _log.warning("--out %s holds the pictures, too: a later prediction over this folder reads what is drawn", out)
    facts = {"model": subject.name, "query": subject.query}
    with DetectionsFile(out / "detections.json", facts) as listed:

        def broken(message: str) -> None:
            _log.warning("left out %s", message)
            listed.broken.append(message)

        for message in pictures.broken:
            broken(message)
        for result in run_on_images(
            subject.detector,
            pictures,
            subject.resizing,
            batch_size=subject.batch_size,
            maps=arguments.draw == "queries",
            on_broken=broken,
        ):
            file, stem = files[result.index], stems[result.index]
            found = entry(file, result, subject.classes, arguments.min_score)
            listed.add(found)
            shown = f"{file}: {len(found['detections'])} objects"
            if arguments.draw != "none":
                try:
                    drawn = cascade_pictures(result, subject.classes, subject.threshold, min_score=arguments.min_score)
                except DataError as error:  # the picture was removed since
                    broken(str(error))
                    continue
                for title, picture in drawn.items():
                    save_image(beside(out / f"{stem}_{title}.jpg", inputs), picture)
                shown += f"; {', '.join(sorted(drawn))} -> {out}/{stem}_*.jpg"
            print(one_line(shown), flush=True)
    print(f"wrote {out}/detections.json", flush=True)
    if listed.broken:
        raise DataError(
            f"{len(listed.broken)} of {len(files) + len(pictures.broken)} pictures could not be used, the first: "
            f"{listed.broken[0]} (all are listed in {out}/detections.json, with the results of the others)"
        )
