"""Re-balanced losses alone: RetinaNet P3..P7, ResNet-50, COCO (paper Table 3, row "RB").

Reproduces: AP 37.66, APs 22.03, 13.60 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_rebalanced_r50.py --data.root COCO --train.init R-50.pkl
The paper does not give the weights of P3..P7 without P2: here QueryDet's own for these levels, over P3's.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

_, *weights = load_config(Path(__file__).with_name("coco_querydet_r50.py")).model.loss.level_weights
config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_rebalanced_r50",
        "model.loss.level_weighting": "table",
        "model.loss.level_weights": tuple(weight / weights[0] for weight in weights),
    },
)
