"""Faster R-CNN against detectron2's with an RPN of three convolutions, on P2..P6."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
from order import as_recorded

import querydet_jax as qd
from querydet_jax.data.transforms import rescale_to_original
from querydet_jax.models.candidates import join_candidates
from querydet_jax.sparse import whole_map

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "coco_querydet_faster_rcnn_r50.py"
GAINS = {"cls_score": 3.0, "bbox_pred": 0.5}
RPN = "proposal_generator.rpn_head."


def make(name: str, shape: list[int]) -> np.ndarray:
    """As recorded: linear layers have their own gains, the RPN's deltas are small."""
    if name.startswith("roi_heads.") and len(shape) == 2:
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        return np.float32(z * GAINS.get(name.split(".")[-2], np.sqrt(2.0)) / np.sqrt(shape[1]))
    if name == "roi_heads.box_predictor.cls_score.bias":
        return np.zeros(shape, np.float32)
    scale = 0.15 if name == RPN + "anchor_deltas.weight" else 1.0
    return np.float32(scale) * recipe.make(name, shape)


def shapes() -> dict[str, list[int]]:
    """The backbone's and FPN's are those of QueryDet, without P6 and P7."""
    found = json.loads((HERE / "querydet10_param_shapes.json").read_text())
    found = {name: shape for name, shape in found.items() if name.startswith(("backbone.", "pixel_"))}
    found = {name: shape for name, shape in found.items() if not name.startswith("backbone.top_block.")}
    layers = {f"{RPN}conv.conv{i}": [256, 256, 3, 3] for i in range(3)}
    layers |= {RPN + "objectness_logits": [3, 256, 1, 1], RPN + "anchor_deltas": [12, 256, 1, 1]}
    layers |= {"roi_heads.box_head.fc1": [1024, 256 * 7 * 7], "roi_heads.box_head.fc2": [1024, 1024]}
    layers |= {"roi_heads.box_predictor.cls_score": [11, 1024], "roi_heads.box_predictor.bbox_pred": [40, 1024]}
    for layer, shape in layers.items():
        found |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return found


@pytest.fixture(scope="module")
def case():
    config = qd.load_config(CONFIG, {"model.num_classes": 10, "model.query.enabled": False, "inference.query": "dense"})
    model = qd.build_model(config.model)
    report = qd.load_weights(model, {name: make(name, shape) for name, shape in shapes().items()})
    assert not report.missing and not report.unexpected
    return config, model


def test_rpn_outputs(case, recorded, image_a):
    z, (_, model) = recorded("faster_rcnn"), case
    outputs = jax.jit(lambda image: model(image))(image_a[None])
    for level in range(2, 7):
        for x, name in ((outputs.cls[level], "obj"), (outputs.box[level], "deltas")):
            x = np.asarray(x).reshape(*x.shape[1:3], -1).transpose(2, 0, 1)
            step = 3 if level == 2 else 1
            np.testing.assert_allclose(x[:, ::step], z[f"p{level}_{name}"], atol=1e-4, rtol=0)


def test_proposals(case, recorded, image_a):
    z, (config, model) = recorded("faster_rcnn"), case

    @jax.jit
    def propose(images):
        found = []
        for level, x in model.features(images).items():
            everywhere = whole_map(jnp.ones(x.shape[:3], bool))
            rows = [y.reshape(-1, y.shape[-1]) for y in model.dense_heads(x)]
            found.append(model.select(level, rows, everywhere, topk=config.inference.topk))
        return model.proposals(join_candidates(found), jnp.asarray([[120, 180]]))

    found = jax.device_get(propose(image_a[None]))
    valid = found.valid[0]
    assert valid.sum() == len(z["prop_boxes"]) < config.model.faster_rcnn.proposals
    alike = np.zeros(valid.sum(), int)  # proposals have no class
    recorded_ones = z["prop_boxes"], z["prop_logits"], alike
    as_recorded((found.boxes[0][valid], found.scores[0][valid], alike), recorded_ones, scores=1e-4, boxes=2e-3)


def test_detections(case, recorded, image_a):
    z, (config, model) = recorded("faster_rcnn"), case
    result = jax.device_get(qd.Detector(model, config.inference)(image_a[None]))
    boxes, scores, classes = rescale_to_original(
        result.boxes[0], result.scores[0], result.classes[0], result.valid[0], (120, 180), (120, 180)
    )
    wanted = z["det_boxes"], z["det_scores"], z["det_classes"]
    as_recorded((boxes, scores, classes), wanted, scores=1e-5, boxes=5e-3)
