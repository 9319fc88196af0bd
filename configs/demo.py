"""Demo: QueryDet on generated aerial scenes, from scratch.

Reproduces: nothing of the paper; shows that everything works, in minutes on two CPU cores.
Command: make demo    (python train.py configs/demo.py && python eval.py runs/demo)
"""

from querydet_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    FPNConfig,
    HeadConfig,
    InferenceConfig,
    ModelConfig,
    QueryConfig,
    TrainConfig,
)

config = Config(
    name="demo",
    model=ModelConfig(
        num_classes=3,
        backbone=BackboneConfig(name="resnet18", flavor="torchvision", norm="batch", freeze_at=0, width=32),
        fpn=FPNConfig(channels=64),
        head=HeadConfig(channels=64, num_convs=2),
        query=QueryConfig(channels=64, num_convs=2),
    ),
    data=DataConfig(
        source="scenes",
        scenes_train=1600,
        scenes_val=100,
        scenes_size=(320, 320),
        train_short=(288, 320, 352),
        train_max=352,
        train_canvases=((320, 320),),
        crop=True,
        test_short=320,
        test_max=320,
        test_canvases=((320, 320),),
        max_boxes=48,
    ),
    train=TrainConfig(
        batch_size=8,
        steps=800,
        learning_rate=0.02,
        warmup_steps=100,
        schedule="cosine",
        clip_norm=10.0,
        checkpoint_every=400,
    ),
    inference=InferenceConfig(query="csq", max_detections=100),
)
