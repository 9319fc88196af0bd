"""`querydet predict`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from querydet_jax.cli.arguments import parse, parse_alone, source_of
from querydet_jax.cli.predict_video import predict_video, video_stems
from querydet_jax.config import Config
from querydet_jax.inference.detections_file import DetectionsFile, coco_ids, entry
from querydet_jax.inference.export.exported import names_exported, open_exported
from querydet_jax.inference.many import predict_many
from querydet_jax.inference.predictor import Predictor, of_exported, of_model, parted
from querydet_jax.inference.runs import open_model
from querydet_jax.inference.tiling import OVERLAP, Tiles, parse_tiles
from querydet_jax.runtime import machine
from querydet_jax.runtime.checkpoint_store import newest_step
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.runtime.files import beside, identity, write_json
from querydet_jax.runtime.names import one_line, result_stems
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.pyav import import_av
from querydet_jax.runtime.stores import as_path, is_url
from querydet_jax.viz.draw import save_image
from querydet_jax.weights.packaged import packaged_path

_log = logging.getLogger("querydet_jax")

_DESCRIPTION = (
    "Detect objects in pictures and videos, and draw what was found and, for a run or a card, what was computed. "
    "Packaged weights go by their name (hituav). A file that `querydet export` wrote (detector.zip, detector.onnx) has "
    "fixed settings."
)


@dataclass(frozen=True)
class PredictArguments:
    images: tuple[str, ...] = ()
    """Pictures, folders of pictures, patterns in quotes ('cam*/*.jpg'), videos, addresses of streams (rtsp://CAMERA/1,
    http://HOST/film.mp4), or a camera (/dev/video0)."""
    out: str = "predictions"
    """Folder for detections.json and the pictures drawn, and for NAME_detections.mp4 and .jsonl (a line per frame) of
    each video; inputs in it stay as they are."""
    weights: str = ""
    """Weight file or run folder, if the source is a card."""
    min_score: str = ""
    """Draw and list detections from this score on: a number; best, each class's score with the largest F1 in the last
    evaluation; or best,CLASS=0.4,CLASS=0.2 (default: best for packaged weights and for exported files that hold scores,
    else 0.3)."""
    draw: Literal["none", "boxes", "queries"] = "boxes"
    """Pictures and videos to draw: none; the boxes; queries: of pictures also, by level, where the cascade looked (a
    second pass)."""
    stride: int = 1
    """Of videos, take each STRIDE-th frame."""
    tiles: str = "off"
    """Large pictures: auto cuts those that would be shrunk into windows at their own scale; a number cuts every picture
    into that many windows along its longer side; off sees every picture whole."""
    overlap: float = OVERLAP
    """With --tiles: least share of a window that the next one shows, too; objects up to that size are seen whole."""
    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: workers of Ray, here or on the cluster that RAY_ADDRESS names, for very many pictures;
    writes part-00000.jsonl and so on to --out, a row per picture, and a second start goes on where the first ended."""
    results: Literal["jsonl", "parquet"] = "jsonl"
    """With --engine ray: lines of JSON, or Parquet (part-00000.parquet) with the same columns."""
    workers: int = 0
    """With --engine ray: number of workers (0: one per GPU or TPU chip, or one)."""
    save_json: str = ""
    """Also write a list of COCO results (image_id, category_id, bbox, score) of the pictures, with their file names, to
    this file."""


def predict(words: Sequence[str], program: str) -> None:
    """Detect objects in pictures and videos, and draw what was found and, for a run, what was computed."""
    source = source_of(words)
    if any(word.split("=")[0] == "--artifact" for word in words):
        raise ConfigError("--artifact: name the file in place of a run: predict FILE.zip --images PICTURE_OR_FOLDER")
    if source is not None and names_exported(as_path(source)):
        arguments = parse_alone(
            PredictArguments,
            _DESCRIPTION,
            words[1:],
            f"{program} {source}",
            "fixed in an exported file; export again with it, or name a run",
        )
        machine.prepare()
        if arguments.weights:
            raise ConfigError(f"--weights {arguments.weights}: an exported file holds its own; export again with these")
        path = as_path(source).resolve()
        make, asked = partial(_exported, path), {"source": str(path)}
    else:
        arguments, config, path = parse(
            PredictArguments, _DESCRIPTION, words, program, source="CARD_OR_RUN_OR_EXPORTED_FILE"
        )
        machine.prepare()
        path, weights = path.resolve(), arguments.weights  # workers start in other folders
        if weights and not packaged_path(weights):
            weights = str(as_path(weights).resolve())
        make = partial(_trained, config, path, weights)
        step = newest_step(as_path(weights or path))
        asked = {"source": str(path), "weights": weights, "step": step, "config": dataclasses.asdict(config)}
    if arguments.engine == "ray":
        _predict_many(make, arguments, asked)
    else:
        for flag, differs in {"--workers": arguments.workers, "--results": arguments.results != "jsonl"}.items():
            if differs:
                raise ConfigError(f"{flag}: is for --engine ray; leave it out")
        _predict(make(), arguments)


def _exported(path: Path) -> Predictor:
    return of_exported(open_exported(path))


def _trained(config: Config, path: Path, weights: str) -> Predictor:
    model = open_model(config, path, weights or None)
    return of_model(model, config, packaged_path(weights) or as_path(weights or path))


def _predict_many(make: Callable[[], Predictor], arguments: PredictArguments, asked: dict[str, Any]) -> None:
    for flag, differs in {
        "--draw none": arguments.draw != "none",
        "no --save-json": bool(arguments.save_json),
        "no --stride": arguments.stride != 1,
    }.items():
        if differs:
            raise ConfigError(f"--engine ray: writes results alone; give {flag}")
    if arguments.workers < 0:
        raise ConfigError(f"--workers {arguments.workers}: give a number from 0 on")
    if not arguments.images or "" in arguments.images:
        raise DataError("--images: name at least one picture or folder")
    tiles = parse_tiles(arguments.tiles, arguments.overlap, ("--tiles", "--overlap"))
    videos, names = parted(arguments.images)
    if videos:
        raise ConfigError(f"--engine ray: is for pictures, and {videos[0]} is a video; leave it out")
    number, broken = predict_many(
        make,
        names,
        as_path(arguments.out),
        facts=asked | {"tiles": arguments.tiles, "overlap": arguments.overlap},
        min_score=arguments.min_score,
        tiles=tiles,
        results=arguments.results,
        workers=arguments.workers,
    )
    print(f"wrote {arguments.out}/part-*.{arguments.results}: {number - len(broken)} pictures", flush=True)
    if broken:
        raise DataError(f"{len(broken)} of {number} pictures could not be used, the first: {broken[0]}")


def _predict(predictor: Predictor, arguments: PredictArguments) -> None:
    if not arguments.images:
        raise DataError("--images: name at least one picture or folder")
    if "" in arguments.images:
        raise DataError("--images: one of the names is empty; give a picture or folder, . for this folder")
    scores = predictor.min_scores(arguments.min_score, "--min-score")
    if arguments.draw == "queries" and predictor.no_maps:
        raise ConfigError(f"--draw queries: {predictor.name} shows none, because {predictor.no_maps}")
    tiles = parse_tiles(arguments.tiles, arguments.overlap, ("--tiles", "--overlap"))
    if arguments.draw == "queries" and tiles:
        raise ConfigError("--draw queries: is of whole pictures; leave out --tiles, or draw boxes")
    videos, names = parted(arguments.images)
    _check_videos(arguments, videos)
    jobs = [partial(_predict_pictures, predictor, arguments, names, scores, tiles)] if names else []
    for video, stem in zip(videos, video_stems(videos), strict=True):
        jobs.append(
            partial(
                predict_video,
                predictor,
                video,
                scores,
                as_path(arguments.out) / stem,
                arguments.draw == "boxes",
                arguments.stride,
            )
        )
    failed: list[DataError] = []
    for job in jobs:
        try:
            job()
        except DataError as error:
            failed.append(error)
    for error in failed[:-1]:
        _log.warning("%s", error)
    if failed:
        raise failed[-1]


def _check_videos(arguments: PredictArguments, videos: Sequence[str]) -> None:
    if arguments.stride < 1:
        raise ConfigError(f"--stride {arguments.stride}: give a whole number from 1 on")
    if not videos:
        if arguments.stride != 1:
            raise ConfigError(f"--stride {arguments.stride}: is for videos; leave it out for pictures")
        return
    if arguments.draw == "queries":
        raise ConfigError(f"--draw queries: is for pictures, and {videos[0]} is a video; choose boxes or none")
    if arguments.save_json:
        raise ConfigError(f"--save-json: is for pictures; what is found in {videos[0]} goes to a .jsonl file in --out")
    for name in (arguments.out, *videos):
        if is_url(name):
            raise ConfigError(f"{name}: videos are read and written on this machine; copy it, and give a path here")
    if arguments.tiles != "off":
        raise ConfigError(f"--tiles {arguments.tiles}: is for pictures, and {videos[0]} is a video; leave it out")
    import_av()


def _predict_pictures(
    predictor: Predictor, arguments: PredictArguments, names: Sequence[str], scores: np.ndarray, tiles: Tiles | None
) -> None:
    pictures = predictor.open_files(names)
    files = [pictures.file_name(i) for i in range(len(pictures))]
    stems, inputs = result_stems(files), {identity(path) for path in pictures.paths} - {None}
    out, results = as_path(arguments.out), as_path(arguments.save_json)
    if identity(out / "detections.json") in inputs:
        raise ConfigError(f"--out {out}: its detections.json is one of the pictures; choose another folder")
    if arguments.save_json and (identity(results) in inputs or results == out / "detections.json"):
        raise ConfigError(f"--save-json {results}: is one of the pictures, or the list itself; choose another file")
    if arguments.draw != "none" and any(path.resolve().parent == out.resolve() for path in pictures.paths):
        _log.warning("--out %s holds the pictures, too: a later prediction over this folder reads what is drawn", out)
    facts = {"model": predictor.name, "query": predictor.query}
    if tiles:
        facts |= {"tiles": tiles.number or "auto", "overlap": tiles.overlap}
    ids, coco = coco_ids(files), []
    with DetectionsFile(out / "detections.json", facts) as listed:

        def broken(message: str) -> None:
            _log.warning("left out %s", message)
            listed.broken.append(message)

        found = predictor.run(pictures, scores, maps=arguments.draw == "queries", tiles=tiles, on_broken=broken)
        # A line per picture is progress enough for a file or pipe.
        for result in progress(found, "predicting", "picture", total=len(files), show=sys.stderr.isatty()):
            file, stem = files[result.index], stems[result.index]
            listed.add(entry(file, result))
            coco += [{**row, "file_name": file} for row in result.to_coco(ids[result.index])]
            shown = f"{file}: {len(result)} objects"
            if arguments.draw != "none":
                try:
                    drawn = result.pictures()
                except DataError as error:  # the picture was removed since
                    broken(str(error))
                    continue
                for title, picture in drawn.items():
                    save_image(beside(out / f"{stem}_{title}.jpg", inputs), picture)
                shown += f"; {', '.join(sorted(drawn))} -> {out}/{stem}_*.jpg"
            tqdm.write(one_line(shown), file=sys.stdout)  # above the bar
            sys.stdout.flush()
    written = [f"{out}/detections.json"]
    if arguments.save_json:
        write_json(results, coco)
        written.append(arguments.save_json)
    print(f"wrote {', '.join(written)}", flush=True)
    if listed.broken:
        raise DataError(
            f"{len(listed.broken)} of {len(files) + len(pictures.broken)} pictures could not be used, the first: "
            f"{listed.broken[0]} (all are listed in {out}/detections.json, with the results of the others)"
        )
