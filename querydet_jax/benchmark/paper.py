"""The paper's own numbers (Yang, Huang, Wang, CVPR 2022), COCO val2017, ResNet-50, FPS on an RTX 2080Ti."""

from __future__ import annotations

# Row name to (AP, APs, FPS), of RetinaNet.
Rows = dict[str, tuple[float, float, float]]

DENSE = "dense"

START_LAYER: Rows = {  # Table 4
    DENSE: (38.53, 24.64, 4.86),
    "P6": (37.91, 23.18, 13.42),
    "P5": (38.22, 23.65, 13.92),
    "P4": (38.36, 24.33, 14.88),
    "P3": (38.45, 24.50, 11.51),
}
QUERY_METHOD: Rows = {  # Table 5
    DENSE: (38.53, 24.64, 4.86),
    "CQ": (38.31, 24.25, 10.49),
    "CCQ": (38.32, 24.26, 8.73),
    "CSQ": (38.36, 24.33, 14.88),
}
CONTEXT: Rows = {  # Table 6
    DENSE: (38.53, 24.64, 4.86),
    "1x1": (38.25, 23.88, 14.09),
    "3x3": (38.30, 24.14, 14.06),
    "5x5": (38.36, 24.18, 14.00),
    "7x7": (38.37, 24.30, 13.77),
    "9x9": (38.37, 24.30, 13.42),
    "11x11": (38.38, 24.33, 13.11),
}


def columns(rows: Rows, name: str) -> dict[str, float | None]:
    """``paper_AP``, ``paper_APs``, ``paper_FPS`` and ``paper_speed_up`` over dense of a row; None if it has none."""
    ap, aps, fps = rows.get(name, (None, None, None))
    return {
        "paper_AP": ap,
        "paper_APs": aps,
        "paper_FPS": fps,
        "paper_speed_up": None if fps is None else fps / rows[DENSE][2],
    }


# By detector, (HR, RB, QH, CSQ) to (AP, APs, FPS). RetinaNet: Table 3, which has the rows of Table 1 with the 1x
# schedule. FCOS: Table 8.
ABLATION: dict[str, dict[tuple[bool, bool, bool, bool], tuple[float, float, float]]] = {
    "retinanet": {
        (False, False, False, False): (37.46, 22.64, 13.60),
        (True, False, False, False): (36.10, 21.94, 4.83),
        (False, True, False, False): (37.66, 22.03, 13.60),
        (True, True, False, False): (38.11, 23.06, 4.83),
        (True, True, True, False): (38.53, 24.64, 4.85),
        (True, True, True, True): (38.36, 24.33, 14.88),
    },
    "fcos": {
        (False, False, False, False): (38.37, 22.34, 17.06),
        (True, True, True, False): (40.05, 25.52, 7.92),
        (True, True, True, True): (39.49, 24.81, 14.40),
    },
}


def ablation(detector: str, *, HR: bool, RB: bool, QH: bool, CSQ: bool) -> dict[str, float | None]:  # noqa: N803
    """``paper_AP``, ``paper_APs`` and ``paper_FPS`` of a row of Table 3 or 8; None if it has no such row."""
    ap, aps, fps = ABLATION[detector].get((HR, RB, QH, CSQ), (None, None, None))
    return {"paper_AP": ap, "paper_APs": aps, "paper_FPS": fps}
