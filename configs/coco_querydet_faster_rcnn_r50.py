"""Faster R-CNN with Cascade Sparse Query in its RPN.

The paper states three shared 3x3 convolutions in the RPN, three 1x1 branches, levels P2..P6, queries from P4, gamma 1.2
and the threshold 0.15. The rest is detectron2's Faster R-CNN. It has one anchor size per level, so s_l is 64 px on P3
and 128 px on P4. The losses are not re-balanced over levels: the paper trains objectness and boxes as usual.

`python eval.py runs/coco_querydet_faster_rcnn_r50` gives both rows, dense and with CSQ.
"""

from querydet_jax.config import (
    AnchorConfig,
    Card,
    Config,
    DataConfig,
    FPNConfig,
    HeadConfig,
    InferenceConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
)

card = Card(
    title="QueryDet on Faster R-CNN, ResNet-50, COCO, 1x schedule (paper Table 9)",
    reproduces=(
        "AP 38.47, APs 22.98 dense at 17.57 FPS; AP 38.20, APs 22.23 with CSQ at 19.03 FPS (paper, one RTX 2080Ti)"
    ),
    command="python train.py configs/coco_querydet_faster_rcnn_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = Config(
    name="coco_querydet_faster_rcnn_r50",
    model=ModelConfig(
        detector="faster_rcnn",
        num_classes=80,
        max_level=6,
        fpn=FPNConfig(top_source="pool"),
        head=HeadConfig(num_convs=3),
        anchors=AnchorConfig(scale=8.0, sizes_per_octave=1),
        loss=LossConfig(
            matcher="standard",
            iou_background=0.3,
            iou_foreground=0.7,
            smooth_l1_beta=1e-6,
            level_weighting="uniform",
        ),
    ),
    data=DataConfig(source="coco", root="coco"),
    train=TrainConfig(batch_size=16, steps=90_000, learning_rate=0.02, decay_steps=(60_000, 80_000)),
    inference=InferenceConfig(query="csq", threshold=0.15, score_threshold=0.05, max_detections=100),
)
