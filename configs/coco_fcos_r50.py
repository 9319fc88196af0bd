"""FCOS P3..P7, ResNet-50, COCO, 1x schedule: the baseline (paper Table 8, row "FCOS").

Reproduces: AP 38.37, APs 22.34, 17.06 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_fcos_r50.py --data.root COCO --train.init R-50.pkl
Settings are detectron2's FCOS, group norm in the towers included; the paper does not state its own. QueryDet's heads
have none (coco_querydet_fcos_r50.py): --model.head.norm none gives the baseline with the same heads.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

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
