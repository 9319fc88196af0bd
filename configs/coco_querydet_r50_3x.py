"""QueryDet, ResNet-50, COCO, 3x schedule (paper Table 1, rows "QueryDet (3x)").

Reproduces: AP 39.47, APs 25.24 dense at 4.89 FPS, AP 39.34, APs 24.91 with CSQ at 15.94 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_querydet_r50_3x.py --data.root COCO --train.init R-50.pkl
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Rows: python eval.py runs/coco_querydet_r50_3x (dense and CSQ).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_r50_3x",
        "train.steps": 270_000,
        "train.decay_steps": (210_000, 250_000),
    },
)
