"""FCOS as detectron2 configures it, with group norm in the towers: the paper does not state its own settings.

QueryDet's heads have no norm (coco_querydet_fcos_r50.py); --model.head.norm none gives a baseline with the same heads.
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='FCOS P3..P7, ResNet-50, COCO, 1x schedule: the baseline (paper Table 8, row "FCOS")',
    reproduces="AP 38.37, APs 22.34, 17.06 FPS (paper, one RTX 2080Ti)",
    command="python train.py configs/coco_fcos_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
querydet = load_config(Path(__file__).with_name("coco_querydet_fcos_r50.py"))
config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "coco_fcos_r50",
        "model.detector": "fcos",
        "model.fpn": querydet.model.fpn,
        "model.head.norm": "group",
        "model.loss.normalizer_init": querydet.model.loss.normalizer_init,
        "inference": querydet.inference,
        "inference.query": "dense",
    },
)
