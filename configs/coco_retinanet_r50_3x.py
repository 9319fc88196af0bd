"""RetinaNet P3..P7, ResNet-50, COCO, 3x schedule: the baseline (paper Table 1, row "RetinaNet (3x)").

Reproduces: AP 38.76, APs 22.89, 13.83 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_retinanet_r50_3x.py --data.root COCO --train.init R-50.pkl
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {"name": "coco_retinanet_r50_3x", "train.steps": 270_000, "train.decay_steps": (210_000, 250_000)},
)
