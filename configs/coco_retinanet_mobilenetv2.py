"""RetinaNet P3..P7, MobileNetV2, COCO, 1x schedule: the baseline (paper Table 7, row "MobileNetV2", "RN").

Reproduces: AP 26.72, APs 15.27, 17.75 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_retinanet_mobilenetv2.py --data.root COCO --train.init mobilenet_v2-b0353104.pth
  mobilenet_v2-b0353104.pth: see coco_querydet_mobilenetv2.py.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_retinanet_mobilenetv2",
        "model.backbone": load_config(Path(__file__).with_name("coco_querydet_mobilenetv2.py")).model.backbone,
    },
)
