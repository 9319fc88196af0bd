"""Re-balanced losses without P2.

The paper gives no weights of P3..P7 for this row: they are QueryDet's own for these levels, divided by that of P3.
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

_, *weights = load_config(Path(__file__).with_name("coco_querydet_r50.py")).model.loss.level_weights
card = Card(
    title='RetinaNet P3..P7, ResNet-50, COCO: re-balanced losses alone (paper Table 3, row "RB")',
    reproduces="AP 37.66, APs 22.03, 13.60 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_rebalanced_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_rebalanced_r50",
        "model.loss.level_weighting": "table",
        "model.loss.level_weights": tuple(weight / weights[0] for weight in weights),
    },
)
