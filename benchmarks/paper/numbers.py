"""The numbers of the paper (Yang, Huang, Wang, CVPR 2022): Tables 1 to 9, and the run that gives each row.

They are for COCO val2017, ResNet-50 and, in FPS, an RTX 2080Ti, unless a title says otherwise. The parts that each row
of Table 3 has are taken from the paper's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl", "FPS")
VISDRONE = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500", "FPS")

DENSE = "dense"  # the rows "No query" of Tables 4 to 6


@dataclass(frozen=True)
class PaperRow:
    """A row of a table.

    Attributes:
      card: ``configs/CARD.py`` trains the row's model.
      query: ``InferenceConfig.query`` of the row.
      values: the paper's numbers, in the order of the table's columns.
      over: the row of the same table, with dense heads on P2..P7, that its speed-up is over; "": itself.
      changes: fields of ``InferenceConfig`` that the row changes.
      parts: in an ablation, which of HR, RB, QH and CSQ the row has.
    """

    name: str
    card: str
    query: str
    values: tuple[float, ...]
    over: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    parts: str | None = None


@dataclass(frozen=True)
class Table:
    """A table. ``at_once``: the arguments of ``benchmark.py`` that measure all its rows; "": there are none."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    at_once: str = ""

    def row(self, name: str) -> PaperRow | None:
        return next((row for row in self.rows if row.name == name), None)

    def value(self, row: PaperRow, column: str) -> float | None:
        """Return a number of the row; None where the table has no such column."""
        return row.values[self.columns.index(column)] if column in self.columns else None

    def speed_up(self, row: PaperRow) -> float:
        base = self.row(row.over) if row.over else row
        assert base is not None, f"{row.name}: no row {row.over}"
        return row.values[-1] / base.values[-1]


_QUERYDET = "coco_querydet_r50"
# The rows that several tables share. Their FPS differ in the second decimal, as printed.
_NO_QUERY = (38.53, 59.11, 41.12, 24.64, 41.97, 49.53, 4.86)
_CSQ = (38.36, 58.78, 40.99, 24.33, 41.97, 49.53, 14.88)
_RETINANET = (37.46, 56.90, 39.94, 22.64, 41.48, 48.04, 13.60)
_QUERYDET_DENSE = (*_NO_QUERY[:-1], 4.85)


def _start(name: str, *values: float, card: str = "") -> PaperRow:
    return PaperRow(name, card or f"{_QUERYDET}_start_{name.lower()}", "csq", values, DENSE)


def _method(name: str, *values: float) -> PaperRow:
    return PaperRow(name, _QUERYDET, name.lower(), values, DENSE)


def _context(radius: int, *values: float) -> PaperRow:
    side = 2 * radius + 1
    return PaperRow(f"{side}x{side}", _QUERYDET, "csq", values, DENSE, {"context": radius})


TABLES: dict[int, Table] = {
    1: Table(
        "RetinaNet and QueryDet, COCO",
        COCO,
        (
            PaperRow("RetinaNet", "coco_retinanet_r50", "dense", _RETINANET, "QueryDet"),
            PaperRow(
                "RetinaNet (3x)", "coco_retinanet_r50_3x", "dense",
                (38.76, 58.27, 41.24, 22.89, 42.53, 50.02, 13.83), "QueryDet (3x)",
            ),
            PaperRow("QueryDet", _QUERYDET, "dense", _QUERYDET_DENSE),
            PaperRow("QueryDet, CSQ", _QUERYDET, "csq", _CSQ, "QueryDet"),
            PaperRow(
                "QueryDet (3x)", "coco_querydet_r50_3x", "dense", (39.47, 59.93, 42.11, 25.24, 42.37, 51.12, 4.89)
            ),
            PaperRow(
                "QueryDet (3x), CSQ", "coco_querydet_r50_3x", "csq",
                (39.34, 59.69, 41.98, 24.91, 42.38, 51.12, 15.94), "QueryDet (3x)",
            ),
        ),
        at_once="table1 --runs runs/coco_retinanet_r50 runs/coco_querydet_r50",
    ),
    2: Table(
        "RetinaNet and QueryDet, VisDrone",
        VISDRONE,
        (
            PaperRow(
                "RetinaNet", "visdrone_retinanet_r50", "dense",
                (26.21, 44.90, 27.10, 0.52, 5.35, 34.63, 37.21, 2.63), "QueryDet",
            ),
            PaperRow(
                "QueryDet", "visdrone_querydet_r50", "dense", (28.35, 48.21, 28.78, 0.51, 5.96, 36.48, 39.42, 1.16)
            ),
            PaperRow(
                "QueryDet, CSQ", "visdrone_querydet_r50", "csq",
                (28.32, 48.14, 28.75, 0.51, 5.96, 36.45, 39.35, 2.75), "QueryDet",
            ),
        ),
    ),
    3: Table(
        "the parts of QueryDet: high resolution, re-balanced losses, query head, CSQ",
        COCO,
        (
            PaperRow("RetinaNet", "coco_retinanet_r50", "dense", _RETINANET, "HR RB QH", parts=""),
            PaperRow(
                "HR", "coco_highres_r50", "dense",
                (36.10, 56.39, 38.17, 21.94, 39.91, 45.25, 4.83), "HR RB QH", parts="HR",
            ),
            PaperRow(
                "RB", "coco_rebalanced_r50", "dense",
                (37.66, 57.57, 40.37, 22.03, 41.86, 49.10, 13.60), "HR RB QH", parts="RB",
            ),
            PaperRow(
                "HR RB", "coco_highres_rebalanced_r50", "dense",
                (38.11, 58.48, 40.85, 23.06, 41.53, 49.36, 4.83), "HR RB QH", parts="HR RB",
            ),
            PaperRow("HR RB QH", _QUERYDET, "dense", _QUERYDET_DENSE, parts="HR RB QH"),
            PaperRow("HR RB QH CSQ", _QUERYDET, "csq", _CSQ, "HR RB QH", parts="HR RB QH CSQ"),
        ),
        at_once="table3 --runs runs/coco_retinanet_r50 runs/coco_highres_r50 runs/coco_rebalanced_r50 "
        "runs/coco_highres_rebalanced_r50 runs/coco_querydet_r50",
    ),
    4: Table(
        "where queries start",
        COCO,
        (
            PaperRow(DENSE, _QUERYDET, "dense", _NO_QUERY),
            _start("P6", 37.91, 57.98, 40.51, 23.18, 42.02, 49.53, 13.42),
            _start("P5", 38.22, 58.55, 40.86, 23.65, 42.00, 49.53, 13.92),
            _start("P4", *_CSQ, card=_QUERYDET),
            _start("P3", 38.45, 58.94, 41.07, 24.50, 41.93, 49.52, 11.51),
        ),
    ),
    5: Table(
        "query method",
        COCO,
        (
            PaperRow(DENSE, _QUERYDET, "dense", _NO_QUERY),
            _method("CQ", 38.31, 58.73, 40.98, 24.25, 41.98, 49.53, 10.49),
            _method("CCQ", 38.32, 58.75, 40.98, 24.26, 41.98, 49.53, 8.73),
            _method("CSQ", *_CSQ),
        ),
        at_once="table5 --run runs/coco_querydet_r50 --images 0",
    ),
    6: Table(
        "context around a key",
        COCO,
        (
            PaperRow(DENSE, _QUERYDET, "dense", _NO_QUERY),
            _context(0, 38.25, 58.60, 40.87, 23.88, 41.97, 49.53, 14.09),
            _context(1, 38.30, 58.66, 40.94, 24.14, 41.97, 49.53, 14.06),
            _context(2, 38.36, 58.72, 40.98, 24.18, 41.97, 49.53, 14.00),
            _context(3, 38.37, 58.73, 40.98, 24.30, 41.97, 49.53, 13.77),
            _context(4, 38.37, 58.73, 40.98, 24.30, 41.97, 49.53, 13.42),
            _context(5, 38.38, 58.755, 40.99, 24.33, 41.97, 49.53, 13.11),
        ),
        at_once="table6 --run runs/coco_querydet_r50 --images 0",
    ),
    7: Table(
        "light backbones",
        COCO,
        (
            PaperRow(
                "MobileNetV2 RetinaNet", "coco_retinanet_mobilenetv2", "dense",
                (26.72, 43.17, 28.17, 15.27, 29.28, 34.51, 17.75), "MobileNetV2 QueryDet",
            ),
            PaperRow(
                "MobileNetV2 QueryDet", "coco_querydet_mobilenetv2", "dense",
                (29.16, 46.20, 30.95, 16.14, 31.26, 38.66, 5.31),
            ),
            PaperRow(
                "MobileNetV2 QueryDet, CSQ", "coco_querydet_mobilenetv2", "csq",
                (28.94, 45.79, 30.71, 15.74, 31.26, 38.66, 21.66), "MobileNetV2 QueryDet",
            ),
            PaperRow(
                "ShuffleNetV2 RetinaNet", "coco_retinanet_shufflenetv2", "dense",
                (23.04, 38.32, 23.75, 12.01, 25.50, 35.16, 17.45), "ShuffleNetV2 QueryDet",
            ),
            PaperRow(
                "ShuffleNetV2 QueryDet", "coco_querydet_shufflenetv2", "dense",
                (26.07, 42.34, 27.30, 13.20, 28.03, 36.23, 5.26),
            ),
            PaperRow(
                "ShuffleNetV2 QueryDet, CSQ", "coco_querydet_shufflenetv2", "csq",
                (25.85, 41.96, 27.08, 12.81, 28.05, 36.23, 20.02), "ShuffleNetV2 QueryDet",
            ),
        ),
    ),
    8: Table(
        "FCOS",
        COCO,
        (
            PaperRow(
                "FCOS", "coco_fcos_r50", "dense",
                (38.37, 57.63, 41.03, 22.34, 41.95, 48.96, 17.06), "QueryDet (FCOS)", parts="",
            ),
            PaperRow(
                "QueryDet (FCOS)", "coco_querydet_fcos_r50", "dense",
                (40.05, 58.69, 43.46, 25.52, 43.43, 50.69, 7.92), parts="HR RB QH",
            ),
            PaperRow(
                "QueryDet (FCOS), CSQ", "coco_querydet_fcos_r50", "csq",
                (39.49, 57.97, 42.82, 24.81, 43.45, 50.69, 14.40), "QueryDet (FCOS)", parts="HR RB QH CSQ",
            ),
        ),
        at_once="table3 --runs runs/coco_fcos_r50 runs/coco_querydet_fcos_r50",
    ),
    9: Table(
        "Faster R-CNN",
        COCO,
        (
            PaperRow(
                DENSE, "coco_querydet_faster_rcnn_r50", "dense",
                (38.47, 59.44, 41.73, 22.98, 41.90, 49.55, 17.57), parts="HR QH",
            ),
            PaperRow(
                "CSQ", "coco_querydet_faster_rcnn_r50", "csq",
                (38.20, 58.88, 41.50, 22.23, 41.91, 49.55, 19.03), DENSE, parts="HR QH CSQ",
            ),
        ),
        at_once="table3 --runs runs/coco_querydet_faster_rcnn_r50",
    ),
}  # fmt: skip

# Figures that a benchmark draws: title, card of the run ("": random weights), arguments of benchmark.py.
FIGURES: dict[int, tuple[str, str, str]] = {
    2: ("work by module", "", "figure2"),
    4: ("the query threshold", _QUERYDET, f"figure4 --run runs/{_QUERYDET} --images 0"),
}

_ABLATIONS = {"retinanet": 3, "fcos": 8, "faster_rcnn": 9}


def rows() -> Iterator[tuple[int, Table, PaperRow]]:
    for number, table in TABLES.items():
        for row in table.rows:
            yield number, table, row


def columns(number: int | None, name: str) -> dict[str, float | None]:
    """Return ``paper_AP``, ``paper_APs``, ``paper_FPS`` and ``paper_speed_up`` of a table's row; None if absent."""
    table = TABLES[number] if number is not None else None
    row = table.row(name) if table is not None else None
    return _columns(table, row)


def ablation(detector: str, *, HR: bool, RB: bool, QH: bool, CSQ: bool) -> dict[str, float | None]:  # noqa: N803
    """Return ``columns`` of the row with these parts in Table 3 (RetinaNet), 8 (FCOS) or 9 (Faster R-CNN)."""
    parts = " ".join(name for name, has in {"HR": HR, "RB": RB, "QH": QH, "CSQ": CSQ}.items() if has)
    table = TABLES[_ABLATIONS[detector]] if detector in _ABLATIONS else None
    rows = table.rows if table is not None else ()
    return _columns(table, next((row for row in rows if row.parts == parts), None))


def _columns(table: Table | None, row: PaperRow | None) -> dict[str, float | None]:
    if table is None or row is None:
        return dict.fromkeys(("paper_AP", "paper_APs", "paper_FPS", "paper_speed_up"))
    return {
        **{f"paper_{column}": table.value(row, column) for column in ("AP", "APs", "FPS")},
        "paper_speed_up": table.speed_up(row),
    }
