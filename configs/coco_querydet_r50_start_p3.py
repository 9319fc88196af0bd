"""QueryDet, ResNet-50, COCO: queries start on P3 (paper Table 4, row "P3").

Reproduces: AP 38.45, APs 24.50, 11.51 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_querydet_r50_start_p3.py --data.root COCO --train.init R-50.pkl
The query head learns on P3 alone, the level that it is asked on.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Row: python eval.py runs/coco_querydet_r50_start_p3 --methods csq
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_r50_start_p3",
        "model.query.levels": (3,),
        "model.loss.query_weights": (10.0,),
        "model.loss.query_gammas": (1.2,),
        "inference.start_level": 3,
    },
)
