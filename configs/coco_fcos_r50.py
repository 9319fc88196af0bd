"""FCOS P3..P7, ResNet-50, COCO, 1x schedule: the baseline (paper Table 8, row "FCOS").

Reproduces: AP 38.37, APs 22.34, 17.06 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_fcos_r50.py --data.root COCO --train.init R-50.pkl
Settings are detectron2's FCOS, group norm in the towers included; the paper does not state its own. QueryDet's heads
have none (coco_querydet_fcos_r50.py): --model.head.norm none gives the baseline with the same heads.
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_fcos_r50",
        "model.detector": "fcos",
        "model.fpn.top_source": "p5",
        "model.head.norm": "group",
        "model.loss.normalizer_init": 300.0,
        "inference.score_threshold": 0.2,
        "inference.nms_iou": 0.6,
        "inference.max_detections": 100,
    },
)
