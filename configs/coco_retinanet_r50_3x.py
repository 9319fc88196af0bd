"""coco_retinanet_r50.py, trained three times as long."""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='RetinaNet P3..P7, ResNet-50, COCO, 3x schedule: the baseline (paper Table 1, row "RetinaNet (3x)")',
    reproduces="AP 38.76, APs 22.89, 13.83 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_retinanet_r50_3x.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_retinanet_r50_3x",
        "train": load_config(Path(__file__).with_name("coco_querydet_r50_3x.py")).train,
    },
)
