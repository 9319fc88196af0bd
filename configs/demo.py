"""A small QueryDet, trained from scratch on generated aerial scenes in minutes on two CPU cores."""

from querydet_jax.config import (
    BackboneConfig,
    Card,
    Config,
    DataConfig,
    FPNConfig,
    HeadConfig,
    InferenceConfig,
    ModelConfig,
    QueryConfig,
    TrainConfig,
)

card = Card(
    title="QueryDet on generated aerial scenes, from scratch",
    reproduces="nothing of the paper; shows that everything works",
    command="make demo    (python train.py configs/demo.py && python eval.py runs/demo)",
    pod=("made for one computer; on several, python train.py configs/demo.py on every host, at most 8 devices in all"),
    measured="README.md",
)
config = Config(
    name="demo",
    # Trains from scratch on two CPU cores: half a ResNet-18 with live batch norm, 64-channel heads.
    model=ModelConfig(
        num_classes=3,
        backbone=BackboneConfig(name="resnet18", flavor="torchvision", norm="batch", freeze_at=0, width=32),
        fpn=FPNConfig(channels=64),
        head=HeadConfig(channels=64, num_convs=2),
        query=QueryConfig(channels=64, num_convs=2),
    ),
    data=DataConfig(
        source="scenes",
        scenes_train=800,
        scenes_val=80,
        # Few objects on much ground, as in the pictures QueryDet is for; training looks at smaller ones.
        scenes_size=(256, 256),
        scenes_val_size=(640, 640),
        train_short=(224, 256, 288),
        train_max=288,
        train_canvases=((256, 256),),
        crop=True,
        test_short=640,
        test_max=640,
        test_canvases=((640, 640),),
        max_boxes=48,
    ),
    train=TrainConfig(
        batch_size=8,
        steps=500,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=1e-4,
        warmup_steps=50,
        schedule="cosine",
        clip_norm=10.0,
        checkpoint_every=250,
    ),
    inference=InferenceConfig(query="csq", max_detections=100),
)
