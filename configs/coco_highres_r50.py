"""High resolution alone: RetinaNet P2..P7, ResNet-50, COCO (paper Table 3, row "HR").

Reproduces: AP 36.10, APs 21.94, 4.83 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_highres_r50.py --data.root COCO --train.init R-50.pkl
One step from coco_highres_rebalanced_r50.py: every level weighs 1.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_highres_rebalanced_r50.py"),
    {
        "name": "coco_highres_r50",
        "model.loss.level_weighting": "uniform",
    },
)
