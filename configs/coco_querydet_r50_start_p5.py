"""coco_querydet_r50.py with queries that start on P5.

The query head learns on P3..P5, on P5 from objects below 128 px. The paper gives no weights and focal gammas for P5:
they are those of P3 and P4.

`python eval.py runs/coco_querydet_r50_start_p5 --methods csq` gives the row.
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='QueryDet, ResNet-50, COCO: queries start on P5 (paper Table 4, row "P5")',
    reproduces="AP 38.22, APs 23.65, 13.92 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_querydet_r50_start_p5.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_r50_start_p5",
        "model.query.levels": (3, 4, 5),
        "model.loss.query_weights": (10.0,) * 3,
        "model.loss.query_gammas": (1.2,) * 3,
        "inference.start_level": 5,
    },
)
