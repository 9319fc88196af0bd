"""FCOS against detectron2's, without norm in the towers: on P2..P7 (26) and P3..P7 (37), one set of weights.

Recorded: logits of P3..P7 (the same for both), targets, losses in training mode, detections.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
from order import as_recorded

import querydet_jax as qd
from querydet_jax.data.transforms import rescale_to_original

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "coco_fcos_r50.py"
FINEST = {"26": 2, "37": 3}


def shapes(finest: int) -> dict[str, list[int]]:
    """Names and shapes of detectron2's FCOS: those of its RetinaNet, but for the head and what P6 is made from."""
    found = json.loads((HERE / "retinanet10_param_shapes.json").read_text())
    for layer, outputs in (("cls_score", 10), ("bbox_pred", 4), ("ctrness", 1)):
        found |= {f"head.{layer}.weight": [outputs, 256, 3, 3], f"head.{layer}.bias": [outputs]}
    found["backbone.top_block.p6.weight"] = [256, 256, 3, 3]
    if finest == 2:
        for layer, size in (("lateral2", 1), ("output2", 3)):
            found |= {f"backbone.fpn_{layer}.weight": [256, 256, size, size], f"backbone.fpn_{layer}.bias": [256]}
    return found


@pytest.fixture(scope="module", params=["26", pytest.param("37", marks=pytest.mark.slow)])
def case(request):
    """Which recording, the configuration and the model."""
    config = qd.load_config(
        CONFIG,
        {
            "model.num_classes": 10,
            "model.min_level": FINEST[request.param],
            "model.head.norm": "none",
            "inference.score_threshold": 0.05,
        },
    )
    model = qd.build_model(config.model)
    report = qd.load_weights(model, {n: recipe.make(n, shape) for n, shape in shapes(FINEST[request.param]).items()})
    assert not report.missing and not report.unexpected
    return request.param, config, model


def test_logits(case, recorded, image_a):
    z, (_, _, model) = recorded("fcos"), case
    outputs = jax.jit(lambda image: model(image))(image_a[None])
    for level in range(3, 8):
        cls, box = outputs.cls[level][0, ..., 0, :], outputs.box[level][0, ..., 0, :]
        for x, name in ((cls, "cls"), (box, "box"), (outputs.centerness[level][0][..., None], "ctr")):
            x = np.asarray(x).transpose(2, 0, 1)[:: 2 if (level, name) == (3, "cls") else 1]
            np.testing.assert_allclose(x, z[f"p{level}_{name}"], atol=1e-4, rtol=0)


def test_targets(case, recorded, batch):
    z, (name, _, model), (_, boxes, classes, _) = recorded("fcos"), case, batch
    levels = [(128 // 2**level, 192 // 2**level) for level in range(FINEST[name], 6)] + [(2, 3), (1, 2)]
    targets = jax.jit(lambda b, c: model.targets(levels, b, c))(boxes, classes)
    labels = np.asarray(targets.labels)
    np.testing.assert_array_equal(labels, z[f"{name}_labels"])
    centerness = np.asarray(targets.centerness)
    np.testing.assert_allclose(centerness[labels >= 0], z[f"{name}_centerness_fg"], atol=1e-6)
    assert not centerness[labels < 0].any() and (labels >= 0).sum() > 70


def test_losses(case, recorded, batch):
    (name, config, model), (images, boxes, classes, sizes) = case, batch
    assert config.model.loss.normalizer_init == 300
    losses = jax.jit(lambda *b: model.losses(*b[:3], 300.0, b[3]))(images, boxes, classes, sizes)
    found = jnp.stack([losses.cls, losses.box, losses.centerness])
    np.testing.assert_allclose(found, recorded("fcos")[f"{name}_losses"], rtol=2e-5)
    assert losses.num_foreground == (recorded("fcos")[f"{name}_labels"] >= 0).sum()
    np.testing.assert_allclose(losses.total, found.sum(), rtol=1e-6)


def test_detections(case, recorded, image_a):
    """The recorded ones are clipped to the image, which leaves some empty: they are dropped after the hundred best."""
    z, (name, config, model) = recorded("fcos"), case
    result = jax.device_get(qd.Detector(model, config.inference)(image_a[None]))
    boxes, scores, classes = rescale_to_original(
        result.boxes[0], result.scores[0], result.classes[0], result.valid[0], (120, 180), (120, 180)
    )
    wanted = z[f"{name}_det_boxes"], z[f"{name}_det_scores"], z[f"{name}_det_classes"]
    as_recorded((boxes, scores, classes), wanted, scores=1e-5, boxes=2e-3)
