"""High resolution without re-balanced losses: coco_highres_rebalanced_r50.py with all levels weighted 1."""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='RetinaNet P2..P7, ResNet-50, COCO: high resolution alone (paper Table 3, row "HR")',
    reproduces="AP 36.10, APs 21.94, 4.83 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_highres_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_highres_rebalanced_r50.py"),
    {
        "name": "coco_highres_r50",
        "model.loss.level_weighting": "uniform",
    },
)
