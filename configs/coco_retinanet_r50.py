"""RetinaNet P3..P7, ResNet-50, COCO, 1x schedule: the baseline (paper Table 1, row "RetinaNet").

Reproduces: AP 37.46, APs 22.64, 13.60 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_retinanet_r50.py --data.root COCO --train.init R-50.pkl
Measured here: not measured; needs COCO and an accelerator.
"""

from querydet_jax.config import (
    Config,
    DataConfig,
    HeadConfig,
    InferenceConfig,
    LossConfig,
    ModelConfig,
    QueryConfig,
    TrainConfig,
)

config = Config(
    name="coco_retinanet_r50",
    model=ModelConfig(
        num_classes=80,
        min_level=3,
        head=HeadConfig(box_bias="zero"),
        query=QueryConfig(enabled=False),
        loss=LossConfig(matcher="standard", level_weighting="uniform"),
    ),
    data=DataConfig(source="coco", root="coco"),
    train=TrainConfig(batch_size=16, steps=90_000, learning_rate=0.01, decay_steps=(60_000, 80_000)),
    inference=InferenceConfig(query="dense", score_threshold=0.05, max_detections=200),
)
