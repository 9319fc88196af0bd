"""RetinaNet P3..P7, ShuffleNetV2 1.0x, COCO, 1x schedule: the baseline (paper Table 7, row "ShuffleNetV2", "RN").

Reproduces: AP 23.04, APs 12.01, 17.45 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_retinanet_shufflenetv2.py --data.root COCO --train.init FILE
  FILE: shufflenetv2_x1-5666bf0f80.pth, see coco_querydet_shufflenetv2.py.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_retinanet_shufflenetv2",
        "model.backbone": load_config(Path(__file__).with_name("coco_querydet_shufflenetv2.py")).model.backbone,
    },
)
