"""COCO's matching and accumulation by pycocotools, or by hotcoco (optional), which gives the same arrays faster.

Letters: I IoU thresholds, R recalls, K categories, S ranges of area, L limits, D detections.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from querydet_jax.runtime.errors import ConfigError, shown

Judge = Literal["pycocotools", "hotcoco"]


@dataclass(frozen=True, eq=False)
class Judged:
    """What an evaluation computes.

    Attributes:
      precision: [I,R,K,S,L], 0..1; -1 where there are no objects.
      recall: [I,K,S,L], likewise.
      matches: per category, the matches in each image that has objects or detections of it, in the first range of
        area; pycocotools' entries.
    """

    precision: np.ndarray
    recall: np.ndarray
    matches: list[list[Any]]

    def counted(self, k: int, limit: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return scores [D] of the detections of category k that count, whether each is right at IoU 0.5, and the
        number of objects; ``limit`` is that on detections per image."""
        found = [(e["dtScores"], e["dtMatches"][0], e["dtIgnore"][0]) for e in self.matches[k]]
        columns = [np.zeros((3, 0)), *(np.array(rows, np.float64)[:, :limit] for rows in found)]
        scores, match, ignored = np.concatenate(columns, axis=1)
        kept = ignored == 0
        objects = sum(int((np.asarray(e["gtIgnore"]) == 0).sum()) for e in self.matches[k])
        return scores[kept], match[kept] > 0, objects


def check_judge(judge: Judge) -> None:
    """Raise ConfigError if there is no such judge, or it is not installed; ask before hours of work."""
    names: tuple[str, ...] = get_args(Judge)
    if judge not in names:
        raise ConfigError(f"judge {shown(judge)}: choose {' or '.join(names)}")
    if judge == "hotcoco":
        _hotcoco()


def run_judge(
    judge: Judge,
    images: list[int],
    categories: list[int],
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    areas: Mapping[str, tuple[float, float]],
    limits: Sequence[int],
) -> Judged:
    """Match detections with objects and accumulate precision and recall.

    Args:
      judge: one of ``Judge``.
      images, categories: ids, ascending.
      truth, found: annotations and detections of these, in the form of ``coco_input``.
      areas: {name: smallest and largest area, px^2, both included}; the first holds all objects.
      limits: of detections per image and category, ascending.

    Raises:
      ConfigError: as ``check_judge``.
    """
    check_judge(judge)
    make_set, make_run = (_hotcoco().COCO, _hotcoco().COCOeval) if judge == "hotcoco" else (COCO, COCOeval)
    # Numbered by position, because hotcoco takes no negative ids.
    image, category = ({i: n for n, i in enumerate(ids)} for ids in (images, categories))
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        sets = []
        for entries in (truth, found):
            coco: Any = make_set()
            coco.dataset = {
                "images": [{"id": i} for i in range(len(images))],
                "categories": [{"id": k, "name": str(k)} for k in range(len(categories))],
                "annotations": [
                    {**e, "image_id": image[e["image_id"]], "category_id": category[e["category_id"]]} for e in entries
                ],
            }
            coco.createIndex()
            sets.append(coco)
        run: Any = make_run(*sets, iouType="bbox")
        run.params.maxDets = list(limits)
        run.params.areaRng = [list(pair) for pair in areas.values()]
        run.params.areaRngLbl = list(areas)
        run.params.imgIds, run.params.catIds = list(range(len(images))), list(range(len(categories)))
        run.evaluate()
        run.accumulate()
    matches: list[list[Any]] = [[] for _ in categories]
    widest = list(next(iter(areas.values())))
    for entry in run.evalImgs:
        if entry is not None and list(entry["aRng"]) == widest:
            matches[entry["category_id"]].append(entry)
    return Judged(run.eval["precision"], run.eval["recall"], matches)


def _hotcoco() -> Any:
    try:
        return importlib.import_module("hotcoco")
    except ImportError:
        raise ConfigError("judge hotcoco: needs hotcoco; pip install -r requirements-hotcoco.txt") from None
