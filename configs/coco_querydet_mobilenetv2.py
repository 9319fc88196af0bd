"""QueryDet, MobileNetV2, COCO, 1x schedule (paper Table 7, rows "MobileNetV2", "QD").

Reproduces: AP 29.16, APs 16.14 dense at 5.31 FPS, AP 28.94, APs 15.74 with CSQ at 21.66 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_querydet_mobilenetv2.py --data.root COCO --train.init mobilenet_v2-b0353104.pth
  mobilenet_v2-b0353104.pth: torchvision's ImageNet weights (or timm's mobilenetv2_100).
  The paper does not say how it normalised pixels nor what P6 is made from: here as the weights were trained, and C5.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Rows: python eval.py runs/coco_querydet_mobilenetv2 (dense and CSQ).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import BackboneConfig, load_config

config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_mobilenetv2",
        "model.backbone": BackboneConfig(name="mobilenet_v2", flavor="torchvision"),
    },
)
