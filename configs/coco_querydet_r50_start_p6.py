"""QueryDet, ResNet-50, COCO: queries start on P6 (paper Table 4, row "P6").

Reproduces: AP 37.91, APs 23.18, 13.42 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_querydet_r50_start_p6.py --data.root COCO --train.init R-50.pkl
The query head learns on P3..P6, objects under 256 px on P6; weights and focal gammas as on P3 and P4, since
the paper gives none.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Row: python eval.py runs/coco_querydet_r50_start_p6 --methods csq
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_r50_start_p6",
        "model.query.levels": (3, 4, 5, 6),
        "model.loss.query_weights": (10.0,) * 4,
        "model.loss.query_gammas": (1.2,) * 4,
        "inference.start_level": 6,
    },
)
