"""coco_querydet_r50.py with queries that start on P3.

The query head learns on P3 alone, the level where queries start.

`python eval.py runs/coco_querydet_r50_start_p3 --methods csq` gives the row.
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='QueryDet, ResNet-50, COCO: queries start on P3 (paper Table 4, row "P3")',
    reproduces="AP 38.45, APs 24.50, 11.51 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_querydet_r50_start_p3.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
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
