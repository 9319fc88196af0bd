"""The baseline of coco_querydet_shufflenetv2.py, which names the weights."""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title=(
        'RetinaNet P3..P7, ShuffleNetV2 1.0x, COCO, 1x schedule: the baseline (paper Table 7, row "ShuffleNetV2", "RN")'
    ),
    reproduces="AP 23.04, APs 12.01, 17.45 FPS (paper, one RTX 2080Ti)",
    command=(
        "python train.py configs/coco_retinanet_shufflenetv2.py --data.root COCO --train.init "
        "shufflenetv2_x1-5666bf0f80.pth"
    ),
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_retinanet_shufflenetv2",
        "model.backbone": load_config(Path(__file__).with_name("coco_querydet_shufflenetv2.py")).model.backbone,
    },
)
