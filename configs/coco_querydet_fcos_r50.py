"""QueryDet on FCOS, ResNet-50, COCO, 1x schedule (paper Table 8, rows "QueryDet (FCOS)").

Reproduces: AP 40.05, APs 25.52 dense at 7.92 FPS, AP 39.49, APs 24.81 with CSQ at 14.40 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_querydet_fcos_r50.py --data.root COCO --train.init R-50.pkl
The paper states of this model only s_l, the lower end of the distances regressed on P_l. FCOS's own settings are
detectron2's, but for the heads, which have no group norm: its statistics need the whole map, which CSQ never computes.
Query head, level weights and CSQ are those of coco_querydet_r50.py.
Pod: the same command on every host with --hosts.auto; up to 16 devices in all (coco_querydet_r50.py tells of more).
Rows: python eval.py runs/coco_querydet_fcos_r50 (dense and CSQ).
Measured here: not measured; needs COCO and an accelerator.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "coco_querydet_fcos_r50",
        "model.detector": "fcos",
        "model.fpn.top_source": "p5",
        "model.loss.normalizer_init": 300.0,
        "inference.score_threshold": 0.2,
        "inference.nms_iou": 0.6,
        "inference.max_detections": 100,
    },
)
