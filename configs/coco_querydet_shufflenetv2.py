"""QueryDet with a light backbone.

shufflenetv2_x1-5666bf0f80.pth holds torchvision's ImageNet weights.
The paper does not say how it normalised pixels or what P6 is made from: here, as the weights were trained, and C5.

`python eval.py runs/coco_querydet_shufflenetv2` gives both rows, dense and with CSQ.
"""

from pathlib import Path

from querydet_jax.config import BackboneConfig, Card, load_config

card = Card(
    title='QueryDet, ShuffleNetV2 1.0x, COCO, 1x schedule (paper Table 7, rows "ShuffleNetV2", "QD")',
    reproduces=(
        "AP 26.07, APs 13.20 dense at 5.26 FPS; AP 25.85, APs 12.81 with CSQ at 20.02 FPS (paper, one RTX 2080Ti)"
    ),
    command=(
        "python train.py configs/coco_querydet_shufflenetv2.py --data.root COCO --train.init "
        "shufflenetv2_x1-5666bf0f80.pth"
    ),
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_shufflenetv2",
        "model.backbone": BackboneConfig(name="shufflenet_v2", flavor="torchvision"),
    },
)
