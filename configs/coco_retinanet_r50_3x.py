"""RetinaNet P3..P7, ResNet-50, COCO, 3x schedule: the baseline (paper Table 1, row "RetinaNet (3x)").

Reproduces: AP 38.76, APs 22.89, 13.83 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_retinanet_r50_3x.py --data.root COCO --train.init R-50.pkl
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_retinanet_r50_3x",
        "train": load_config(Path(__file__).with_name("coco_querydet_r50_3x.py")).train,
    },
)
