"""The baseline of coco_querydet_r50.py, which names data and weights."""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title="RetinaNet P3..P7, ResNet-50, COCO, 1x schedule: the baseline (paper Tables 1 and 3, first rows)",
    reproduces="AP 37.46, APs 22.64, 13.60 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_retinanet_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_retinanet_r50",
        "model.min_level": 3,
        "model.head.box_bias": "zero",
        "model.query.enabled": False,
        "model.loss.matcher": "standard",
        "model.loss.level_weighting": "uniform",
        "inference.query": "dense",
        "inference.score_threshold": 0.05,
    },
)
