"""Draw the figures of docs/csq.md from a run of the demonstration: `PYTHONPATH=. python docs/figures.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import querydet_jax as qd
from querydet_jax.data import open_dataset
from querydet_jax.ops.matching import query_targets
from querydet_jax.viz.draw import contact_sheet, draw_heatmap, draw_sites, save_image
from querydet_jax.viz.primitives import WHITE, frame

DOCS = Path(__file__).parent
SCENE = 3
CROP = 128  # px; a multiple of every stride in the figures


def main(run: str) -> None:
    config = qd.load_config(f"{run}/config.json")
    model = qd.build_model(config.model)
    qd.load_weights(model, run)
    detector = qd.Detector(model, config.inference)
    scenes = open_dataset(config.data, "val")
    image, truth = scenes.load(SCENE), scenes.annotation(SCENE)
    trace = detector.trace(image[None])

    # The object that lies farthest from all others and from the rim.
    centres = (truth.boxes[:, :2] + truth.boxes[:, 2:]) / 2
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + np.diag(np.full(len(centres), np.inf))
    inside = np.minimum(centres, np.asarray(image.shape[1::-1]) - centres).min(axis=1) > CROP / 2
    chosen = np.argmax(np.where(inside, apart.min(axis=1), -1))
    x, y = (int(v - CROP / 2) // 16 * 16 for v in centres[chosen])
    picture = image[y : y + CROP, x : x + CROP]

    def cut(cells, level: int) -> np.ndarray:
        size, stride = CROP >> level, 1 << level
        return np.asarray(cells[level][0])[y // stride :, x // stride :][:size, :size]

    panels = [
        draw_heatmap(picture, cut(trace.probability, 4), 16, title="P4", threshold=config.inference.threshold),
        *(
            draw_sites(picture, cut(trace.active, level), cut(trace.keys, level), 2**level, title=f"P{level}")
            for level in (3, 2)
        ),
    ]
    save_image(DOCS / "csq_object.jpg", contact_sheet([("", panel) for panel in panels], columns=3, max_width=1500))

    height, width = image.shape[:2]
    targets = [
        query_targets(
            height // 16, width // 16, 16, jnp.asarray(truth.boxes), jnp.asarray(truth.classes),
            scale_range=(0.0, 64.0), radius=radius,
        )
        for radius in ("object", "level")
    ]  # fmt: skip
    framed = image.copy()
    for box in truth.boxes:
        frame(framed, box.tolist(), 1.0, 1.0, WHITE)
    panels = [
        draw_heatmap(framed, np.asarray(target, np.float32), 16, title=title, threshold=0.5)
        for target, title in zip(targets, ("radius: the object's scale", "radius: s_l = 64 px"), strict=True)
    ]
    save_image(DOCS / "csq_target.jpg", contact_sheet([("", panel) for panel in panels], max_width=1500))


if __name__ == "__main__":
    main(sys.argv[1])
