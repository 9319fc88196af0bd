"""The fields of COCO's annotation and result files that are read, with their types and ranges.

msgspec checks them while it reads a file, in a tenth of the time of json. What it refuses is read again with json,
to name the entry and the field at fault, or to accept what means the same: whole floats as integers, NumPy's numbers.
"""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from querydet_jax.runtime.errors import DataError, shown
from querydet_jax.runtime.reading import parse_json, read_text

# COCO's evaluation leaves out larger objects, and detections that match none, without a word. px^2.
LARGEST_AREA = 1e10

Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=2**31 - 1)]
# Limits also refuse nan.
Pixels = Annotated[float, Meta(ge=-1e9, le=1e9)]
Length = Annotated[float, Meta(ge=0, le=1e9)]
# Neither blank nor with control characters or halves of characters, which tables and files of results cannot hold.
CLASS_NAME = r"\A(?=.*\S)[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+\Z"
ClassName = Annotated[str, Meta(pattern=CLASS_NAME)]
Box = tuple[Pixels, Pixels, Length, Length]


class Placed(Struct, gc=False):
    """A box [x, y, width, height] in an image, px."""

    image_id: Id
    category_id: Id
    bbox: Box


class Result(Placed, gc=False):
    """A detection."""

    score: Annotated[float, Meta(ge=-1e300, le=1e300)]


class Truth(Placed, gc=False):
    """An object, or a region that holds a group of objects."""

    area: Annotated[float, Meta(ge=0, le=LARGEST_AREA)] | UnsetType = UNSET
    iscrowd: Literal[0, 1] | bool = 0

    @property
    def size(self) -> float:
        """The area, px^2: that of the segment if the file states one, else the box's."""
        return self.bbox[2] * self.bbox[3] if self.area is UNSET else self.area


class Annotation(Truth, gc=False, kw_only=True):
    id: Id


class Image(Struct, gc=False):
    id: Id
    file_name: Annotated[str, Meta(min_length=1)]
    width: Side
    height: Side


class Category(Struct, gc=False):
    id: Id
    name: ClassName


class Instances(Struct):
    """An annotation file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]
    info: Any = None


_REFUSED = (msgspec.ValidationError, UnicodeEncodeError)  # the second: half a character (a lone surrogate)

_REMEDIES = {
    "id": "give every entry an integer id",
    "image_id": "give the integer id of an image",
    "category_id": "give the integer id of a category",
    "bbox": "give four finite numbers x, y, width, height, without a negative width or height",
    "area": f"give a finite number from 0 to {LARGEST_AREA:g}, or leave it out",
    "iscrowd": "give 0 or 1",
    "score": "give a finite number",
    "file_name": "give the file's name as text",
    "name": "give the class name as text, without control characters",
    "width": "give the image's width in whole pixels",
    "height": "give the image's height in whole pixels",
}
# Keys that other parts of such files have, too: licences, key points, attributes.
_ELSEWHERE = {"id", "name", "width", "height"}


class Numbered(Protocol):
    @property
    def id(self) -> int: ...


F = TypeVar("F", bound=Struct)
E = TypeVar("E", bound=Struct)


def read_file(path: str | Path, form: type[F]) -> F:
    """Read an annotation file.

    Args:
      form: ``Instances``, or another Struct.

    Raises:
      DataError: the file is not readable, has a key twice or lacks a list, or an entry has a wrong value.
    """
    text = read_text(path)
    with contextlib.suppress(msgspec.DecodeError, RecursionError):  # the slow way says what and where
        content = msgspec.json.decode(text, type=form)
        fields = msgspec.structs.asdict(content)
        if not _may_repeat(text, {name: value for name, value in fields.items() if isinstance(value, list)}):
            return content
    return check_content(parse_json(text, str(path)), form, str(path))


def read_results(path: str | Path) -> list[Result]:
    """Read a file of results: a list of entries.

    Raises:
      DataError: as ``read_file``.
    """
    text = read_text(path)
    with contextlib.suppress(msgspec.DecodeError, RecursionError):  # as above
        content = msgspec.json.decode(text, type=list[Result])
        if not _may_repeat(text, {"results": content}):
            return content
    content = parse_json(text, str(path))
    if not isinstance(content, list):
        raise DataError(f"{path}: not a list of detections; give COCO results, as eval.py writes them")
    return check_entries(content, Result, f"{path}: results")


def check_content(content: Any, form: type[F], name: str) -> F:
    """Check the content of an annotation file; ``name`` is the file's in messages.

    Raises:
      DataError: as ``read_file``.
    """
    if isinstance(content, form):
        return content
    if not isinstance(content, Mapping):
        raise DataError(f"{name}: not a COCO annotation file (the top level is not an object); export it as COCO json")
    values = {}
    for field in msgspec.structs.fields(form):
        if field.name not in content and not field.required:
            continue
        values[field.name] = value = content.get(field.name)
        if typing.get_origin(field.type) is list:
            if not isinstance(value, (list, tuple)):
                raise DataError(
                    f"{name}: has no list {field.name!r}; a COCO annotation file needs images, annotations, categories"
                )
            (kind,) = typing.get_args(field.type)
            values[field.name] = check_entries(value, kind, f"{name}: {field.name}")
    return form(**values)


def check_entries(items: Any, kind: type[E], where: str) -> list[E]:
    """Check a list of entries; ``where`` is the file and the list in messages.

    Raises:
      DataError: as ``read_file``.
    """
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Sequence):
        raise DataError(f"{where} is {shown(items)}, not a list of entries; give a list")
    try:
        return msgspec.convert(items, list[kind])
    except _REFUSED:
        return [_entry(item, kind, f"{where}[{n}]") for n, item in enumerate(items)]


def _may_repeat(text: str, lists: Mapping[str, list[Any]]) -> bool:
    """Return whether an object may have a key twice, which msgspec passes over: there are more keys than objects."""
    for name, items in lists.items():
        keys = set(items[0].__struct_fields__) - _ELSEWHERE if items else ()
        if text.count(f'"{name}"') > 1 or any(text.count(f'"{key}"') > len(items) for key in keys):
            return True
    return False


def _entry(item: Any, kind: type[E], where: str) -> E:
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is not an object; remove or correct the entry")
    values = {}
    for field in msgspec.structs.fields(kind):
        if field.name in item:
            try:
                values[field.name] = _value(item[field.name], field.type)
            except _REFUSED:
                named = issubclass(kind, Truth) and isinstance(item.get("id"), int) and field.name != "id"
                label = f" (id {shown(item['id'])})" if named else ""
                raise DataError(
                    f"{where}{label} has {field.name} {_in_json(item[field.name])}; {_REMEDIES[field.name]}"
                ) from None
        elif field.required:
            raise DataError(f"{where} has no {field.name!r}; add it or remove the entry")
    return kind(**values)


def _in_json(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def _value(value: Any, kind: Any) -> Any:
    """Return the value as msgspec's type; raise msgspec.ValidationError if it means another."""
    if hasattr(value, "tolist"):  # of NumPy, jax, torch
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        value = [part.tolist() if hasattr(part, "tolist") else part for part in value]
    try:
        return msgspec.convert(value, kind)
    except _REFUSED:
        if isinstance(value, float) and value.is_integer():
            return msgspec.convert(int(value), kind)
        raise


def check_ids(items: Sequence[Numbered], where: str) -> dict[int, int]:
    """Return {id: position}.

    Raises:
      DataError: two entries have the same id.
    """
    positions = {item.id: n for n, item in enumerate(items)}
    if len(positions) < len(items):
        seen: dict[int, int] = {}
        for n, item in enumerate(items):
            if item.id in seen:
                raise DataError(
                    f"{where}[{n}] has the same id {item.id} as {where.rpartition(' ')[2]}[{seen[item.id]}]; "
                    "make the ids unique"
                )
            seen[item.id] = n
    return positions


def positions_of(items: Sequence[Placed], field: str, positions: Mapping[int, int], where: str) -> np.ndarray:
    """Look up the ids in ``field`` of the entries, int64 [n].

    Raises:
      DataError: ``positions`` lacks one.
    """
    found = np.array([positions.get(getattr(item, field), -1) for item in items], np.int64)
    if (found < 0).any():
        n = int(np.argmax(found < 0))
        raise DataError(
            f"{where}[{n}]{_id_label(items[n])} has {field} {getattr(items[n], field)}, which no "
            f"{'image' if field == 'image_id' else 'category'} has; correct or remove it"
        )
    return found


def box_text(item: Placed) -> str:
    """Return the box for a message, as files write it."""
    return shown([int(v) if v.is_integer() else v for v in item.bbox])


def _id_label(item: Any) -> str:
    return f" (id {item.id})" if isinstance(item, Annotation) else ""


def boxes_of(items: Sequence[Placed], where: str) -> np.ndarray:
    """Return the boxes, float64 [n, 4] (x, y, width, height).

    Raises:
      DataError: a box is larger than COCO's evaluation counts.
    """
    boxes = np.array([item.bbox for item in items], np.float64).reshape(-1, 4)
    large = boxes[:, 2] * boxes[:, 3] > LARGEST_AREA
    if large.any():
        n = int(np.argmax(large))
        raise DataError(
            f"{where}[{n}] has bbox {box_text(items[n])} of more than {LARGEST_AREA:g} px^2, which COCO's "
            "evaluation leaves out; correct or remove it"
        )
    return boxes
