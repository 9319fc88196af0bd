"""QueryDet with a light backbone.

mobilenet_v2-b0353104.pth holds torchvision's ImageNet weights; timm's mobilenetv2_100 loads as well.
The paper does not say how it normalised pixels or what P6 is made from: here, as the weights were trained, and C5.

`python eval.py runs/coco_querydet_mobilenetv2` gives both rows, dense and with CSQ.
"""

from pathlib import Path

from querydet_jax.config import BackboneConfig, Card, load_config

card = Card(
    title='QueryDet, MobileNetV2, COCO, 1x schedule (paper Table 7, rows "MobileNetV2", "QD")',
    reproduces=(
        "AP 29.16, APs 16.14 dense at 5.31 FPS; AP 28.94, APs 15.74 with CSQ at 21.66 FPS (paper, one RTX 2080Ti)"
    ),
    command=(
        "python train.py configs/coco_querydet_mobilenetv2.py --data.root COCO --train.init mobilenet_v2-b0353104.pth"
    ),
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_mobilenetv2",
        "model.backbone": BackboneConfig(name="mobilenet_v2", flavor="torchvision"),
    },
)
