"""Format ``findings.results`` as text and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from querydet_jax.analysis.findings import BINS, FINEST, HELD, levels_name
from querydet_jax.config import Config
from querydet_jax.viz.text import shorten, text_table

_CLASSES, _SIZES = 20, 8  # rows shown; the JSON file has all
_SUMMARY = {"mean": "mean", "median": "median", "p90": "90 %", "p99": "99 %", "max": "max"}
_LABELS = {entry.key: entry.label for entry in BINS} | {"all": "all"}


def text(found: dict[str, Any], config: Config) -> str:
    return "\n".join(_lines(found, config))


def _lines(found: dict[str, Any], config: Config) -> Iterator[str]:
    images = found["images"]
    yield (
        f"{found['config']}, {found['split']}: {images['number']:,} images, {images['objects']:,} objects; "
        f"{images['without_objects']:,} images without, {images['crowd']:,} crowd boxes"
        + (f", {images['ignored']:,} ignored regions and other objects" if images["ignored"] else "")
    )
    yield f"resized as at {found['rule']}"
    if found["exif"]:
        yield found["exif"]
    yield from ("", _classes(found["classes"], images["objects"]))
    yield from ("", _boxes_per_image(found["boxes_an_image"], training=found["split"] == "train"))
    yield from (
        "",
        _sizes_of_images(images["sizes"], images["number"]),
        "",
        _canvases(images),
        *_misfits(found, config),
    )
    yield from ("", "objects by sqrt(area)", _sizes(found["sizes"], images["objects"]))
    if found["anchors"] is not None:
        yield from ("", *_anchors(found["anchors"], config))
    if found["queries"] is None:
        yield from ("", "no queries: model.query.enabled is off, or inference.start_level is the finest level or none")
        return
    yield from ("", "query targets: share of the cells at which the query head should fire", _queries(found, config))
    yield from ("", *_inference(found["inference"], config))


def _classes(rows: list[dict[str, Any]], objects: int) -> str:
    lines = [
        [
            shorten(row["class"], 24),
            f"{row['objects']:,}",
            _share(row["objects"], objects),
            f"{row['images']:,}",
            "-" if row["median_size"] is None else f"{row['median_size']:.1f}",
        ]
        for row in rows[:_CLASSES]
    ]
    rest = sum(row["objects"] for row in rows[_CLASSES:])
    if rows[_CLASSES:]:
        lines.append([f"{len(rows) - _CLASSES} more", f"{rest:,}", _share(rest, objects), "", ""])
    return text_table(["class", "objects", "share", "images", "median px"], lines)


def _boxes_per_image(found: dict[str, Any], *, training: bool) -> str:
    over = f"{found['images_over']:,} images over data.max_boxes {found['max_boxes']}"
    if training and found["images_over"]:  # evaluation has no limit
        over += f", which drops {found['boxes_over']:,} boxes"
    return (
        f"boxes per image: mean {found['mean']:.1f}, median {found['median']:.1f}, 95 % {found['p95']:.1f}, "
        f"max {found['max']:,}; {over}"
    )


def _sizes_of_images(rows: list[dict[str, Any]], images: int) -> str:
    lines = [[_size(row), f"{row['images']:,}", _share(row["images"], images)] for row in rows[:_SIZES]]
    rest = sum(row["images"] for row in rows[_SIZES:])
    if rest:
        lines.append([f"{len(rows) - _SIZES:,} other sizes", f"{rest:,}", _share(rest, images)])
    return text_table(["image, height x width", "images", "share"], lines)


def _canvases(images: dict[str, Any]) -> str:
    lines = [
        [
            _size(row),
            f"{row['images']:,}",
            _share(row["images"], images["number"]),
            "-" if row["filled"] is None else f"{row['filled']:.1%}",
        ]
        for row in images["canvases"]
    ]
    if images["on_no_canvas"]:
        none = images["on_no_canvas"]
        lines.append(["none", f"{none:,}", _share(none, images["number"]), ""])
    return text_table(["canvas", "images", "share", "filled"], lines)


def _misfits(found: dict[str, Any], config: Config) -> Iterator[str]:
    number = found["images"]["may_fit_no_canvas"]
    if not number:
        return
    if found["split"] == "val":
        yield f"{number:,} images fit no canvas and evaluation refuses them: add one to data.test_canvases"
    elif config.data.crop:
        yield f"{number:,} images may fit no canvas and are cropped (data.crop); the following counts whole images"
    else:
        yield f"{number:,} images may fit no canvas and training refuses them: add one to data.train_canvases"


def _sizes(rows: list[dict[str, Any]], objects: int) -> str:
    lines = [
        [_LABELS[row["bin"]], *(cell for key in ("original", "input") for cell in _counted(row[key], objects))]
        for row in rows
    ]
    return text_table(["", "image px", "share", "network px", "share"], lines)


def _anchors(rows: list[dict[str, Any]], config: Config) -> Iterator[str]:
    loss = config.model.loss
    names = [levels_name(config, finest) for finest in FINEST]
    parts = {
        "below": f"<{loss.iou_background:g}",
        "between": f"{loss.iou_background:g}-{loss.iou_foreground:g}",
        "above": f">={loss.iou_foreground:g}",
    }
    yield (
        "IoU of objects with their best anchor, by sqrt(area) in network px: share of the objects in the row\n"
        f"(below {loss.iou_foreground:g} an object has at most a low-quality match)"
    )
    lines = [
        [
            _LABELS[row["bin"]],
            f"{row['objects']:,}",
            *(_share(row[name][part], row["objects"]) for name in names for part in parts),
        ]
        for row in rows
    ]
    header = [f"{name} {part}" for name in names for part in parts.values()]
    yield text_table(["", "objects", *header], lines)


def _queries(found: dict[str, Any], config: Config) -> str:
    lines = [
        [
            row["level"],
            f"<{row['below_px']:g} px",
            *_counted(row["small_objects"], found["images"]["objects"]),
            *_summary(row),
        ]
        for row in found["queries"]
    ]
    return text_table(["level", "of objects", "objects", "share", *_SUMMARY.values()], lines)


def _inference(found: dict[str, Any] | None, config: Config) -> Iterator[str]:
    data, inference = config.data, config.inference
    if found is None:
        yield "no image fits a canvas of inference: add one to data.test_canvases"
        return
    yield (
        f"inference (short side {data.test_short}, long side at most {data.test_max}) with perfect queries, "
        "which are the targets themselves: share of active cells"
    )
    if found["left_out"]:
        yield f"({found['left_out']:,} images are left out because they fit no canvas of data.test_canvases)"
    lines = [
        [
            f"{row['level']} context {row['context']}" + ("*" if row["context"] == inference.context else ""),
            *_summary(row),
        ]
        for row in found["active"]
    ]
    lines += [[f"{row['level']} buffer*", *_summary(row)] for row in found["room"]]
    yield text_table(["level", *_SUMMARY.values()], lines)
    yield "*: as configured; a buffer also holds the cells from which the active ones are computed"
    yield ""
    yield "objects whose centre cell is a key with perfect queries: the upper limit of query recall"
    levels = [row["level"] for row in found["room"]]
    reached = [
        [_LABELS[row["bin"]], f"{row['objects']:,}", *(_share(row[level], row["objects"]) for level in levels)]
        for row in found["reached"]
    ]
    yield text_table(["", "objects", *levels], reached)
    yield ""
    yield from _capacities(found["capacities"], levels)


def _capacities(found: dict[str, Any], levels: Sequence[str]) -> Iterator[str]:
    suggested = found["suggested"]
    values = ", ".join(f"{row['capacity']:g}" for row in suggested)
    if len(suggested) == 1:  # one capacity serves all shares
        values += ","
    asked = " / ".join(f"{100 * share:g} %" for share in HELD[-len(suggested) :])
    yield f"inference.capacities ({values}) would hold {asked} of the images on {' and '.join(levels)}"
    if found["configured"]:
        configured = ", ".join(f"{row['capacity']:g} ({row['held']:.1%})" for row in found["configured"])
        yield f"configured capacities, and the share of images they would hold: {configured}"
    yield (
        "A trained query head fires at other cells, and at more of them if the threshold is low: "
        "benchmark.py capacities --run RUN counts them"
    )


def _counted(number: int, total: int) -> tuple[str, str]:
    return f"{number:,}", _share(number, total)


def _share(number: int, total: int) -> str:
    return f"{number / total:.1%}" if total else "-"


def _summary(row: dict[str, Any]) -> list[str]:
    return [f"{row[key]:.2%}" for key in _SUMMARY]


def _size(row: dict[str, Any]) -> str:
    return f"{row['height']}x{row['width']}"
