"""The baseline of coco_querydet_mobilenetv2.py, which names the weights."""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title=('RetinaNet P3..P7, MobileNetV2, COCO, 1x schedule: the baseline (paper Table 7, row "MobileNetV2", "RN")'),
    reproduces="AP 26.72, APs 15.27, 17.75 FPS (paper, one RTX 2080Ti)",
    command=(
        "python train.py configs/coco_retinanet_mobilenetv2.py --data.root COCO --train.init mobilenet_v2-b0353104.pth"
    ),
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_retinanet_mobilenetv2",
        "model.backbone": load_config(Path(__file__).with_name("coco_querydet_mobilenetv2.py")).model.backbone,
    },
)
