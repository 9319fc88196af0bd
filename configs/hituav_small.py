"""Real small objects: a third of the boxes are below 16x16 px. From scratch, on two CPU cores.

HIT-UAV (CC BY 4.0) as COCO json: a folder with instances_train.json, instances_val.json, train/ and val/.
"""

import dataclasses
from pathlib import Path

from querydet_jax.config import Card, Config, DataConfig, InferenceConfig, TrainConfig, load_config

card = Card(
    title="QueryDet with a small head on HIT-UAV, thermal pictures from a drone",
    reproduces="nothing of the paper",
    command="python train.py configs/hituav_small.py --data.root HIT_UAV && python eval.py runs/hituav_small",
    pod="the same command on every host with --hosts.auto; at most 8 devices in all",
    measured="""\
36 minutes of training (1,500 steps of 8 crops, one seed), then all 407 validation images at 512x640, batch 1; 2 cores
of an AMD EPYC, jax 0.10.2, Python 3.11.7. Medians, methods in turn. Since this training, kernel gradients are summed in
another order, which changes their last bits.

  method     AP   AP50   AP75    APs  AP<16  AR100  ms/image  active cells
  dense   16.82  39.93  11.31  10.12   5.97  37.55     101.0  all
  csq     16.84  39.88  11.35  10.12   6.02  38.34      79.2  P2 9.1%, P3 21.7%

On P3 queries reach the centre cell of 90 % of the objects below 16 px, on P2 of 89 %. The head is small (64 channels,
two layers), so there is little to save: CSQ is 1.28 times as fast as dense.
""",
)
config = Config(
    name="hituav_small",
    classes=("Person", "Car", "Bicycle", "OtherVehicle"),
    model=dataclasses.replace(load_config(Path(__file__).with_name("demo.py")).model, num_classes=4),
    data=DataConfig(
        source="coco",
        root="hit_uav",
        train_annotations="instances_train.json",
        train_images="train",
        val_annotations="instances_val.json",
        val_images="val",
        train_short=(448, 512, 576),
        train_max=720,
        train_canvases=((320, 320),),
        crop=True,
        test_short=512,
        test_max=640,
        test_canvases=((512, 640),),
        max_boxes=100,
    ),
    train=TrainConfig(
        batch_size=8,
        steps=1500,
        optimizer="adamw",
        learning_rate=1e-3,
        warmup_steps=100,
        schedule="cosine",
        clip_norm=10.0,
        checkpoint_every=250,
        log_every=25,
    ),
    inference=InferenceConfig(query="csq", max_detections=200),
)
