"""QueryDet on FCOS.

Of this model the paper states only s_l, the lower end of the distances regressed on P_l. The settings of FCOS are
detectron2's, except for group norm in the heads: its statistics need the whole map, which CSQ never computes.
Query head, level weights and CSQ are those of coco_querydet_r50.py.

`python eval.py runs/coco_querydet_fcos_r50` gives both rows, dense and with CSQ.
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='QueryDet on FCOS, ResNet-50, COCO, 1x schedule (paper Table 8, rows "QueryDet (FCOS)")',
    reproduces=(
        "AP 40.05, APs 25.52 dense at 7.92 FPS; AP 39.49, APs 24.81 with CSQ at 14.40 FPS (paper, one RTX 2080Ti)"
    ),
    command="python train.py configs/coco_querydet_fcos_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
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
