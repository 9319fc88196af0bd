"""What a detector found in one picture, and its forms for people and other programs."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from querydet_jax.inference.pipeline import QueryTrace
from querydet_jax.runtime.errors import DataError, QueryDetError
from querydet_jax.runtime.files import identity
from querydet_jax.runtime.names import result_stems
from querydet_jax.runtime.stores import as_path
from querydet_jax.viz.draw import save_image
from querydet_jax.viz.stages import cascade_pictures, overview

if TYPE_CHECKING:
    from supervision import Detections as SupervisionDetections  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Prediction:
    """The n detections of one picture, best first, in px of the picture as it was given (EXIF orientation applied).

    Attributes:
      index: position among the pictures given.
      path: the picture's file, or the video's; None for one in memory and of a stream.
      frame: position of a video's frame, from 0; None for a picture.
      time: of a video's frame, in seconds since the first; None for a picture.
      size: (height, width) of the picture.
      boxes: float32 ``[n, 4]``, xyxy px.
      scores: float32 ``[n]``.
      classes: int64 ``[n]``, indices into ``class_names``.
      class_names: names of the K classes.
      queries: query probabilities, keys and active cells by level, maps ``[h, w]`` of this picture; None for dense
        inference, for an exported file, and where not asked for.
      scale: pixels of the picture per pixel of the network input. The vertical and horizontal scales differ by
        rounding; this is the larger, with which the maps cover the picture.
      threshold: query threshold that the maps were made with.
      min_scores: the score that detections have at least, of all classes or per class ``[K]``.
      load: reads the picture.
    """

    index: int
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_names: tuple[str, ...]
    load: Callable[[], np.ndarray]
    path: Path | None = None
    frame: int | None = None
    time: float | None = None
    queries: QueryTrace | None = None
    scale: float = 1.0
    threshold: float = 0.0
    min_scores: np.ndarray | float = 0.0

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in Counter(self.names).most_common())
        return f"Prediction({self._name}: {counts or 'nothing found'})"

    @property
    def names(self) -> list[str]:
        """The class name of each detection, ``[n]``."""
        return [self.class_names[k] for k in self.classes]

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 RGB ``[H, W, 3]``, read when first asked for.

        Raises:
          DataError: its file is gone or damaged.
        """
        return self.load()

    def at_least(self, min_scores: np.ndarray | float) -> Prediction:
        """Return the detections that have at least this score, or that of their class (``[K]``)."""
        scores = np.asarray(min_scores, np.float32)
        kept = self.scores >= (scores[self.classes] if scores.ndim else scores)
        return dataclasses.replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            classes=self.classes[kept],
            min_scores=min_scores,
        )

    def pictures(self) -> dict[str, np.ndarray]:
        """Draw the picture, title to uint8 RGB: ``detections`` and, with maps, ``query_P4`` .. and ``sites_P3`` .."""
        return cascade_pictures(self, self.class_names, self.threshold, min_score=self.min_scores)

    def plot(self) -> Image.Image:
        """Draw the detections; with maps on a sheet with the steps of the cascade. Small pictures are enlarged."""
        pictures = self.pictures()
        if len(pictures) > 1:
            return Image.fromarray(overview(self.image, pictures))
        return Image.fromarray(pictures["detections"])

    def save(self, path: str | Path) -> Path:
        """Write ``plot`` to a ``.jpg`` or ``.png`` file, or to ``NAME_detections.jpg`` in a folder; return the file.

        Raises:
          DataError: the file is the picture itself, or its suffix is another.
          QueryDetError: it cannot be written.
        """
        path = as_path(path)
        if path.is_dir() or not path.suffix:
            path = path / f"{result_stems([self._name])[0]}_detections.jpg"
        if self.path is not None and identity(path) is not None and identity(path) == identity(self.path):
            raise DataError(f"{path}: is the picture itself; choose another file")
        save_image(path, np.asarray(self.plot()))
        return path

    def to_coco(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """Return COCO results: image_id, category_id, bbox (x, y, width, height) and score of each detection.

        Args:
          image_id: the picture's id in the annotations; None: its position among the pictures given, from 1. Category
            ids also count from 1, in the order of the classes.
        """
        corners = self.boxes.astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        return [
            {
                "image_id": self.index + 1 if image_id is None else image_id,
                "category_id": k + 1,
                "bbox": box,
                "score": score,
            }
            for box, score, k in zip(boxes.tolist(), self.scores.tolist(), self.classes.tolist(), strict=True)
        ]

    def to_supervision(self) -> SupervisionDetections:
        """Return ``supervision.Detections``, with the names as ``data["class_name"]``.

        Raises:
          QueryDetError: the package supervision is not installed.
        """
        try:
            import supervision  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise QueryDetError("to_supervision needs an extra; pip install -r requirements-supervision.txt") from None
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.classes,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def _repr_png_(self) -> bytes:
        """Return ``plot`` as PNG, which notebooks show."""
        buffer = io.BytesIO()
        self.plot().save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def _name(self) -> str:
        if self.frame is None:
            return f"picture_{self.index}" if self.path is None else str(self.path)
        number = f"frame_{self.frame:06}"
        return number if self.path is None else str(self.path.with_stem(f"{self.path.stem}_{number}"))
