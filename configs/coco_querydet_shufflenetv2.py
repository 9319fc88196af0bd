"""QueryDet, ShuffleNetV2 1.0x, COCO, 1x schedule (paper Table 7, rows "ShuffleNetV2", "QD").

Reproduces: AP 26.07, APs 13.20 dense at 5.26 FPS, AP 25.85, APs 12.81 with CSQ at 20.02 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_querydet_shufflenetv2.py --data.root COCO --train.init FILE
  FILE: shufflenetv2_x1-5666bf0f80.pth, torchvision's ImageNet weights.
  The paper does not say how it normalised pixels nor what P6 is made from: here as the weights were trained, and C5.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Rows: python eval.py runs/coco_querydet_shufflenetv2 (dense and CSQ).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import BackboneConfig, load_config

config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_shufflenetv2",
        "model.backbone": BackboneConfig(name="shufflenet_v2", flavor="torchvision"),
    },
)
