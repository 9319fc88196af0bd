"""coco_querydet_r50.py, trained three times as long.

`python eval.py runs/coco_querydet_r50_3x` gives both rows, dense and with CSQ.
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='QueryDet, ResNet-50, COCO, 3x schedule (paper Table 1, rows "QueryDet (3x)")',
    reproduces=(
        "AP 39.47, APs 25.24 dense at 4.89 FPS; AP 39.34, APs 24.91 with CSQ at 15.94 FPS (paper, one RTX 2080Ti)"
    ),
    command="python train.py configs/coco_querydet_r50_3x.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_r50_3x",
        "train.steps": 270_000,
        "train.decay_steps": (210_000, 250_000),
    },
)
