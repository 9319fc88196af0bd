"""QueryDet, ResNet-50, COCO, 1x schedule (paper Table 1, rows "QueryDet").

Reproduces: AP 38.53 dense at 4.85 FPS, 38.36 with CSQ at 14.88 FPS (paper, one RTX 2080Ti).
Command: python train.py configs/coco_querydet_r50.py --data.root COCO --train.init R-50.pkl
  COCO: a folder with annotations/instances_{train,val}2017.json, train2017/, val2017/; or, with --data.source tfds,
  the data directory of a copy in ArrayRecord (python -m querydet_jax.data prepare-coco).
  R-50.pkl: detectron2's ImageNetPretrained/MSRA/R-50.pkl.
Learning rate and schedule are for 16 images a step, over any number of devices and hosts; docs/scaling.md for others.
Measured here: not measured; needs COCO and an accelerator.
"""

from querydet_jax.config import Config, DataConfig, InferenceConfig, ModelConfig, TrainConfig

config = Config(
    name="coco_querydet_r50",
    model=ModelConfig(num_classes=80),
    data=DataConfig(source="coco", root="coco"),
    train=TrainConfig(batch_size=16, steps=90_000, learning_rate=0.01, decay_steps=(60_000, 80_000)),
    inference=InferenceConfig(query="csq", max_detections=200),
)
