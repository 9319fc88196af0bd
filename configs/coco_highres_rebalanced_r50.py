"""QueryDet without its query head; all else, matcher and score threshold included, is that of coco_querydet_r50.py."""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='RetinaNet P2..P7 with re-balanced losses, ResNet-50, COCO (paper Table 3, row "HR", "RB")',
    reproduces="AP 38.11, APs 23.06, 4.83 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_highres_rebalanced_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_highres_rebalanced_r50",
        "model.query.enabled": False,
        "inference.query": "dense",
    },
)
